/** A bar for each node of the cluster: how much of the last seconds it computed, and waited. */

import { element } from "./dom.js";

const PERIOD_MS = 1000;
const WINDOW = 4;
/** A node is called the slowest only if it computes this much longer than the fastest. */
const CLEARLY_SLOWER = 1.05;

/**
 * What each node did between two answers of the server.
 * @returns {{node: number, address: string, lost: boolean, peakBytes: number, slowest: boolean,
 *   compute: number, sync: number, bytes: number}[]} seconds and bytes; 0 where nothing is known
 */
export function loads(older, newer) {
  const before = new Map(older.map((entry) => [entry.node, entry]));
  const found = newer.map((entry) => {
    const past = before.get(entry.node) ?? entry;
    return {
      node: entry.node,
      address: entry.address,
      lost: entry.lost,
      peakBytes: entry.peak_bytes,
      slowest: false,
      compute: Math.max(entry.compute_seconds - past.compute_seconds, 0),
      sync: Math.max(entry.sync_seconds - past.sync_seconds, 0),
      bytes: Math.max(entry.bytes - past.bytes, 0),
    };
  });
  const times = found.filter((load) => !load.lost).map((load) => load.compute);
  const longest = Math.max(...times);
  if (times.length > 1 && longest > CLEARLY_SLOWER * Math.min(...times)) {
    found.find((load) => !load.lost && load.compute === longest).slowest = true;
  }
  return found;
}

export class NodesView {
  #root;
  #server;
  #answers = [];
  #opened = false;

  /**
   * @param {HTMLDetailsElement} root
   * @param {import("./server.js").Server} server
   */
  constructor(root, server) {
    this.#root = root;
    this.#server = server;
    root.open = matchMedia("(min-width: 40rem)").matches;
  }

  /** Asks once a second, as long as the page is visible; ends at a server that knows no nodes. */
  async run() {
    for (;;) {
      if (!document.hidden) {
        try {
          const answer = await this.#server.get("nodes", { mayAsk: false });
          this.#show(answer.nodes, answer.error);
        } catch (error) {
          if (error.status === 404) return;
          this.#answers = [];
          this.#root.querySelector("summary").textContent = "Nodes: no answer";
        }
      }
      await new Promise((resolve) => setTimeout(resolve, PERIOD_MS));
    }
  }

  #show(nodes, error) {
    this.#answers.push({ nodes, time: performance.now() });
    if (this.#answers.length > WINDOW) this.#answers.shift();
    const first = this.#answers[0];
    const seconds = (performance.now() - first.time) / 1000;
    const found = loads(first.nodes, nodes);
    const lost = found.filter((load) => load.lost);
    this.#root.hidden = found.length === 0 && !error;
    this.#root.querySelector("summary").textContent = summary(found, lost);
    this.#root.querySelector("summary").classList.toggle("lost", lost.length > 0);
    this.#root.querySelector("ul").replaceChildren(...found.map((load) => row(load, seconds)));
    this.#alert(error ?? (lost.length > 0 ? "A node was lost" : null));
  }

  #alert(text) {
    const line = this.#root.querySelector(".error");
    if (text !== null && !this.#opened) this.#root.open = true;
    this.#opened = text !== null;
    line.hidden = text === null;
    // Setting the same text again would announce it again, each second.
    if (line.textContent !== (text ?? "")) line.textContent = text ?? "";
  }
}

function summary(found, lost) {
  const count = found.length === 1 ? "1 node" : `${found.length} nodes`;
  if (lost.length > 0) return `${count}, ${lost.length} lost`;
  const compute = found.reduce((sum, load) => sum + load.compute, 0);
  const sync = found.reduce((sum, load) => sum + load.sync, 0);
  return compute + sync > 0 ? `${count}, ${percent(compute, sync)} % compute` : `${count}, idle`;
}

function row(load, seconds) {
  const busy = load.compute + load.sync > 0;
  const share = busy ? percent(load.compute, load.sync) : 0;
  let figures = "idle";
  if (load.lost) figures = "lost";
  else if (busy) figures = `compute ${share}\u00a0%, sync ${100 - share}\u00a0%`;
  const bar = element("div", { class: "bar", role: "img", "aria-label": figures });
  if (busy && !load.lost) {
    for (const [name, width] of [["compute", share], ["sync", 100 - share]]) {
      const part = element("span", { class: name });
      part.style.inlineSize = `${width}%`;
      bar.append(part);
    }
  }
  const head = element("div", { class: "head" }, element("span", {}, `${load.node}: ${load.address}`));
  if (load.lost) head.append(element("span", { class: "mark" }, "lost"));
  else if (load.slowest) head.append(element("span", { class: "mark" }, "slowest"));
  const details = [figures, `memory ${bytesText(load.peakBytes)}`];
  if (busy && !load.lost && seconds > 0) details.push(`${bytesText(load.bytes / seconds)}/s`);
  return element(
    "li",
    { class: load.lost ? "lost" : "node" },
    head,
    bar,
    element("div", { class: "figures" }, details.join(" · ")),
  );
}

function percent(part, rest) {
  return Math.round((100 * part) / (part + rest));
}

/** Bytes with a decimal unit and three digits at most. */
export function bytesText(bytes) {
  let value = bytes;
  let unit = "B";
  for (const next of ["kB", "MB", "GB", "TB"]) {
    if (value < 1000) break;
    value /= 1000;
    unit = next;
  }
  return `${value < 10 && unit !== "B" ? value.toFixed(1) : Math.round(value)}\u00a0${unit}`;
}
