/** Messages on the page: what the user wrote, and answers while they grow. */

import { button, copyButton, element } from "./dom.js";
import { codeBlock, MarkdownStream } from "./markdown.js";

/** A user's message. `onEdit(text)` is called with the text that shall replace it. */
export class UserView {
  #body;
  #foot;

  constructor(text, onEdit) {
    this.#body = element("div", { class: "body", dir: "auto" }, text);
    this.editButton = button("Edit", () => this.#edit(text, onEdit), "Edit message");
    this.#foot = element(
      "div",
      { class: "foot" },
      this.editButton,
      copyButton(() => text, "Copy message"),
    );
    const name = element("h2", { class: "visually-hidden" }, "You");
    this.node = element("article", { class: "user" }, name, this.#body, this.#foot);
  }

  set busy(busy) {
    this.editButton.disabled = busy;
  }

  #edit(text, onEdit) {
    const area = element("textarea", { "aria-label": "Edited message", rows: "3" });
    area.value = text;
    const close = () => {
      form.replaceWith(this.#body);
      this.#foot.hidden = false;
      this.editButton.focus();
    };
    const form = element(
      "form",
      {},
      area,
      element(
        "div",
        { class: "actions" },
        element("button", { type: "submit", class: "small" }, "Send again"),
        button("Cancel", close, "Cancel edit"),
      ),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (area.value.trim() !== "" && !this.editButton.disabled) onEdit(area.value);
    });
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      } else if (sends(event)) {
        event.preventDefault();
        form.requestSubmit();
      }
    });
    this.#body.replaceWith(form);
    this.#foot.hidden = true;
    area.focus();
  }
}

/** Whether a key press in a text field sends the text; Enter that ends an input method's does not. */
export function sends(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
}

/** An answer. `update` shows what has come since the last call. */
export class AnswerView {
  #answer;
  #markdown;
  #shown = { content: 0, reasoning: 0 };
  #thought;
  #thoughtText = document.createTextNode("");
  #tools = element("div", { class: "tools" });
  #toolCode = [];
  #progress;
  #body = element("div", { class: "markdown", dir: "auto" });
  #figures = element("span", { class: "figures" });
  #foot;

  /**
   * @param {import("./answer.js").Answer} answer
   * @param {() => void} onRegenerate
   */
  constructor(answer, onRegenerate) {
    this.#answer = answer;
    this.#markdown = new MarkdownStream(this.#body);
    this.#progress = progressOf();
    this.#thought = element(
      "details",
      { class: "reasoning", hidden: "" },
      element("summary"),
      element("div", { dir: "auto" }, this.#thoughtText),
    );
    this.regenerateButton = button("Regenerate", onRegenerate, "Regenerate answer");
    this.regenerateButton.hidden = true;
    this.#foot = element("div", { class: "foot", hidden: "" });
    this.#foot.append(
      copyButton(() => answer.content, "Copy answer"),
      this.regenerateButton,
      this.#figures,
    );
    // Pieces are not announced: the page announces the finished answer once.
    this.node = element(
      "article",
      { class: "assistant working", "aria-live": "off" },
      element("h2", { class: "visually-hidden" }, "Answer"),
      this.#progress.node,
      this.#thought,
      this.#body,
      this.#tools,
      this.#foot,
    );
  }

  update() {
    const answer = this.#answer;
    this.#progress.show(answer);
    if (answer.reasoning.length > this.#shown.reasoning) {
      this.#thoughtText.appendData(answer.reasoning.slice(this.#shown.reasoning));
      this.#shown.reasoning = answer.reasoning.length;
      this.#thought.hidden = false;
    }
    if (answer.content.length > this.#shown.content) {
      this.#markdown.write(answer.content.slice(this.#shown.content));
      this.#shown.content = answer.content.length;
    }
    this.#thought.querySelector("summary").textContent = thoughtTitle(answer, this.#working);
    answer.toolCalls.forEach((call, index) => this.#showToolCall(call, index));
    this.#figures.textContent = figuresOf(answer);
    this.#foot.hidden = this.#figures.textContent === "" && this.#working;
  }

  get #working() {
    return this.node.classList.contains("working");
  }

  /** Shows the end: its reason if it is not the usual one. */
  finish() {
    this.node.classList.remove("working");
    this.update();
    this.#markdown.end();
    this.#progress.node.hidden = true;
    const note = endNote(this.#answer);
    if (note !== "") this.#foot.before(element("p", { class: "note" }, note));
    if (this.#answer.error !== null) {
      this.#foot.before(element("p", { class: "error", role: "alert" }, this.#answer.error));
    }
  }

  /** What the finished answer says, as text. */
  get text() {
    return this.#body.innerText;
  }

  /** Shows why nothing is generated yet. */
  wait(text) {
    this.#progress.wait(text);
  }

  #showToolCall(call, index) {
    this.#toolCode[index] ??= codeBlock(this.#tools);
    const code = this.#toolCode[index];
    code.closest("figure").querySelector("figcaption span").textContent = `Tool call: ${call.name}`;
    const text = this.#working ? call.arguments : pretty(call.arguments);
    if (code.textContent !== text) code.textContent = text;
  }
}

function pretty(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json;
  }
}

function thoughtTitle(answer, working) {
  const time = duration(answer.reasoningMs);
  const thinking = working && answer.content === "" && answer.toolCalls.length === 0;
  return thinking ? `Thinking, ${time}` : `Thought for ${time}`;
}

/** Speed and number of tokens of an answer; "" as long as the server has said neither. */
export function figuresOf({ timings, usage }) {
  const tokens = timings?.predicted_n ?? usage?.completion_tokens;
  const parts = [];
  if (timings?.predicted_per_second) parts.push(`${speed(timings.predicted_per_second)} tokens/s`);
  if (tokens) parts.push(tokens === 1 ? "1 token" : `${tokens.toLocaleString("en")} tokens`);
  if (timings?.prompt_ms) parts.push(`prompt ${duration(timings.prompt_ms)}`);
  return parts.join(" · ");
}

function speed(perSecond) {
  return perSecond < 100 ? perSecond.toFixed(1) : Math.round(perSecond);
}

function duration(ms) {
  const seconds = ms / 1000;
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  if (seconds < 99.5) return `${Math.round(seconds)} s`;
  return `${Math.round(seconds / 60)} min`;
}

function endNote({ finishReason, stopped }) {
  if (stopped) return "Stopped.";
  if (finishReason === "length") return "Cut off: the token limit or the end of the context.";
  return "";
}

/** The line and bar that stand where the answer will come. */
function progressOf() {
  const bar = element("progress", { "aria-label": "Prompt", max: "1" });
  const line = element("p", { class: "note" }, "Waiting for the server");
  const node = element("div", { class: "prompt" }, line, bar);
  bar.hidden = true;
  return {
    node,
    wait(text) {
      line.textContent = text;
    },
    show(answer) {
      node.hidden = !answer.empty;
      if (node.hidden || answer.progress === null) return;
      const { total, processed } = answer.progress;
      bar.hidden = false;
      bar.value = total > 0 ? processed / total : 0;
      line.textContent = progressText(answer.progress);
    },
  };
}

/** `processed` counts the tokens that were in the cache. */
export function progressText({ total, cache, processed, time_ms }) {
  const count = (tokens) => tokens.toLocaleString("en");
  let text = `Reading the prompt: ${count(processed)} of ${count(total)} tokens`;
  if (cache > 0) text += `, ${count(cache)} cached`;
  const read = processed - cache;
  if (read > 0 && processed < total && time_ms > 0) {
    text += `, about ${duration((time_ms * (total - processed)) / read)} left`;
  }
  return text;
}
