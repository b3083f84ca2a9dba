/** The chat page: the conversation, its controls, and one answer at a time. */

import { Answer } from "./answer.js";
import { element } from "./dom.js";
import { AnswerView, sends, UserView } from "./messages.js";
import { NodesView } from "./nodes.js";
import { Server, ServerError } from "./server.js";

/** Time between two updates of the page while an answer comes: about 14 in a second. */
const UPDATE_MS = 70;
/** The log follows the answer if its end is nearer than this to what is seen. */
const NEAR_END_PX = 40;

const find = (id) => document.getElementById(id);
const log = find("log");
const input = find("input");

/** @type {{data: {role: "user", content: string} | Answer, view: UserView | AnswerView}[]} */
let turns = [];
/** @type {AbortController | null} */
let running = null;
let model = { id: null, contextSize: null };

const server = new Server(askForKey);

/** The model's name and context size, as soon as it is loaded. */
async function readModel() {
  for (;;) {
    try {
      const onWait = (message, seconds) => notice(waitText(message, seconds));
      const { data } = await server.get("v1/models", { onWait });
      const found = data[0];
      model = {
        id: found?.id ?? null,
        contextSize: found?.meta?.n_ctx ?? found?.max_model_len ?? null,
      };
      find("model").textContent = model.id ?? "";
      notice("");
      showContext();
      return;
    } catch (error) {
      notice(error instanceof ServerError ? error.message : "The model could not be read");
      if (error.status !== 0 && !(error.status >= 500)) return;
    }
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}

function waitText(message, seconds) {
  return `${message}; next try in ${Math.round(seconds)} s`;
}

function notice(text) {
  find("notice").textContent = text;
  find("notice").hidden = text === "";
}

function requestBody() {
  const history = turns
    .slice(0, -1)
    .filter(({ data }) => data.role === "user" || !data.empty)
    .map(({ data }) => (data.role === "user" ? data : data.toMessage()));
  const system = find("system").value.trim();
  const body = {
    messages: system === "" ? history : [{ role: "system", content: system }, ...history],
    stream: true,
    stream_options: { include_usage: true },
    timings_per_token: true,
    return_progress: true,
    chat_template_kwargs: { enable_thinking: find("thinking").checked },
  };
  if (model.id !== null) body.model = model.id;
  if (find("temperature").value !== "") body.temperature = find("temperature").valueAsNumber;
  if (find("max-tokens").value !== "") body.max_tokens = find("max-tokens").valueAsNumber;
  return body;
}

function ask(text) {
  const view = new UserView(text, (edited) => {
    cutBefore(view);
    ask(edited);
  });
  add({ data: { role: "user", content: text }, view });
  return answer();
}

async function answer() {
  const data = new Answer();
  const view = new AnswerView(data, () => {
    cutBefore(view);
    answer();
  });
  add({ data, view });
  running = new AbortController();
  const { signal } = running;
  setBusy(true);
  const update = throttled(() => keepingEnd(() => view.update()));
  try {
    const onWait = (message, seconds) => view.wait(waitText(message, seconds));
    for await (const chunk of server.complete(requestBody(), { signal, onWait })) {
      data.add(chunk, performance.now());
      update();
    }
    if (data.finishReason === null) data.error = "The connection ended before the answer did";
  } catch (error) {
    if (signal.aborted) data.stopped = true;
    else data.error = error instanceof ServerError ? error.message : `The page failed: ${error}`;
  }
  update.cancel();
  keepingEnd(() => view.finish());
  running = null;
  setBusy(false);
  if (model.id === null && data.error === null) readModel();
  if (turns.at(-1)?.view !== view) return;
  find("announcer").textContent = data.error === null ? view.text || "No text" : "";
  showContext();
}

function stop() {
  running?.abort();
}

/** Calls `action` at most once in UPDATE_MS. A timer, since hidden pages get no animation frames. */
function throttled(action) {
  let timer = null;
  const call = () => {
    timer ??= setTimeout(() => {
      timer = null;
      action();
      showContext();
    }, UPDATE_MS);
  };
  call.cancel = () => clearTimeout(timer);
  return call;
}

function add(turn) {
  turns.push(turn);
  log.append(turn.view.node);
  log.scrollTop = log.scrollHeight;
}

/** Takes away a message and all that follow it. */
function cutBefore(view) {
  const at = turns.findIndex((turn) => turn.view === view);
  for (const turn of turns.splice(at)) turn.view.node.remove();
}

function setBusy(busy) {
  log.setAttribute("aria-busy", String(busy));
  find("send").hidden = busy;
  find("stop").hidden = !busy;
  find("export").disabled = busy || turns.length === 0;
  for (const { view } of turns) {
    if (view instanceof UserView) view.busy = busy;
    else view.regenerateButton.hidden = busy || view !== turns.at(-1).view;
  }
  const focused = document.activeElement;
  if (!focused || focused === document.body || focused.hidden) focusInput();
}

function focusInput() {
  input.focus();
  // Chromium gives the focus back when a dialog closes, but not the caret.
  input.setSelectionRange(input.value.length, input.value.length);
}

/** Changes the log; shows its end afterwards only if its end was seen before. */
function keepingEnd(change, height = log.clientHeight) {
  const followed = log.scrollHeight - log.scrollTop - height < NEAR_END_PX;
  change();
  if (followed) log.scrollTop = log.scrollHeight;
}

/** Keeps the end in sight when the log becomes lower, as when the nodes take more room. */
function followSize() {
  let height = log.clientHeight;
  const observer = new ResizeObserver(() => {
    keepingEnd(() => {}, height);
    height = log.clientHeight;
  });
  observer.observe(log);
}

function showContext() {
  const used = turns.findLast(({ data }) => data.contextUsed)?.data.contextUsed ?? 0;
  const count = (tokens) => tokens.toLocaleString("en");
  let text = "";
  if (model.contextSize !== null) {
    text = `Context: ${count(used)} of ${count(model.contextSize)} tokens`;
  } else if (used > 0) {
    text = `Context: ${count(used)} tokens`;
  }
  find("context").textContent = text;
}

function exportConversation() {
  const system = find("system").value.trim();
  const messages = turns.map(({ data }) =>
    data.role === "user"
      ? data
      : {
          ...data.toMessage(),
          finish_reason: data.finishReason,
          timings: data.timings,
          usage: data.usage,
          error: data.error,
        },
  );
  if (system !== "") messages.unshift({ role: "system", content: system });
  const now = new Date().toISOString();
  const text = JSON.stringify({ model: model.id, exported: now, messages }, null, 2);
  const href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  element("a", { href, download: `chat-${now.slice(0, 19).replaceAll(":", "-")}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(href), 1000);
}

function newChat() {
  if (turns.length > 0 && !confirm("Discard this conversation?")) return;
  stop();
  turns = [];
  log.replaceChildren();
  find("export").disabled = true;
  showContext();
  focusInput();
}

/** The key that the user types, or null. */
function askForKey() {
  const dialog = find("key-dialog");
  const field = find("key");
  return new Promise((resolve) => {
    dialog.returnValue = "";
    dialog.addEventListener(
      "close",
      () => {
        const key = field.value.trim();
        field.value = "";
        focusInput();
        resolve(dialog.returnValue === "use" && key !== "" ? key : null);
      },
      { once: true },
    );
    dialog.showModal();
    field.focus();
  });
}

find("key-dialog")
  .querySelector("form")
  .addEventListener("submit", (event) => {
    event.preventDefault();
    find("key-dialog").close("use");
  });
find("key-cancel").addEventListener("click", () => find("key-dialog").close());

find("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = input.value.trim();
  if (running || text === "") return;
  input.value = "";
  ask(text);
});
input.addEventListener("keydown", (event) => {
  if (!sends(event)) return;
  event.preventDefault();
  find("composer").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !find("key-dialog").open) stop();
});
// A field that is folded away cannot be pointed at.
find("settings").addEventListener("invalid", () => (find("settings").open = true), true);
find("stop").addEventListener("click", stop);
find("new-chat").addEventListener("click", newChat);
find("export").addEventListener("click", exportConversation);

followSize();
focusInput();
readModel();
new NodesView(find("nodes"), server).run();
