/** Requests to the server that served this page: key, errors, waiting for the model. */

import { events } from "./events.js";

const DEFAULT_WAIT_S = 2;
const LONGEST_WAIT_S = 60;

/** What the server refused, or a server that did not answer, as one readable line. */
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export class Server {
  #key = null;
  #askForKey;
  #asking = null;

  /** @param {() => Promise<string | null>} askForKey */
  constructor(askForKey) {
    this.#askForKey = askForKey;
  }

  /** A JSON document. Options as for `#request`. */
  async get(path, options = {}) {
    const response = await this.#request(path, options);
    try {
      return await response.json();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError(`${path}: the server's answer is not JSON`);
    }
  }

  /** Yields the chunks of a chat completion; ends at `[DONE]` or at the end of the stream. */
  async *complete(body, options) {
    const response = await this.#request("v1/chat/completions", { ...options, body });
    try {
      for await (const data of events(response.body)) {
        if (data === "[DONE]") return;
        const chunk = parse(data);
        if (chunk.error) throw new ServerError(messageOf(chunk.error) ?? "The server failed");
        yield chunk;
      }
    } catch (error) {
      if (error instanceof TypeError) throw new ServerError("The connection to the server broke");
      throw error;
    }
  }

  /**
   * Sends a request until it is answered: asks once for a key if one is needed, waits while the
   * model is being loaded.
   * @param {string} path
   * @param {object} options
   * @param {object} [options.body] posted as JSON
   * @param {AbortSignal} [options.signal]
   * @param {(message: string, seconds: number) => void} [options.onWait] without it, no waiting
   * @param {boolean} [options.mayAsk] whether the user may be asked for a key
   */
  async #request(path, { body, signal, onWait, mayAsk = true }) {
    let asked = false;
    for (;;) {
      const key = this.#key;
      const response = await this.#send(path, body, signal, key);
      if (response.ok) return response;
      const error = await readError(response);
      if (response.status === 401 && this.#key !== key) continue;
      if (response.status === 401 && mayAsk && !asked) {
        asked = true;
        if ((await this.#newKey()) !== null) continue;
      } else if (error.loading && onWait) {
        const seconds = waitOf(response);
        onWait(error.message, seconds);
        await sleep(seconds, signal);
        continue;
      }
      throw error;
    }
  }

  async #send(path, body, signal, key) {
    const headers = {};
    if (key !== null) headers.Authorization = `Bearer ${key}`;
    if (body) headers["Content-Type"] = "application/json";
    try {
      return await fetch(path, {
        method: body ? "POST" : "GET",
        headers,
        body: body && JSON.stringify(body),
        signal,
        cache: "no-store",
        credentials: "omit",
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The server cannot be reached");
    }
  }

  /** Asks for a key; requests that need one at the same time share the question. */
  async #newKey() {
    this.#asking ??= this.#askForKey().finally(() => (this.#asking = null));
    const key = await this.#asking;
    if (key !== null) this.#key = key;
    return key;
  }
}

function parse(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new ServerError("The server sent an event that is not JSON");
  }
}

async function readError(response) {
  let fields = null;
  try {
    fields = (await response.json()).error;
  } catch {
    // Not our server's error object: its status has to do.
  }
  const status = `${response.status} ${response.statusText}`.trim();
  const message = messageOf(fields) ?? `The server answered ${status}`;
  const error = new ServerError(message, response.status);
  error.loading = response.status === 503 && (fields?.code === "loading" || /loading/i.test(message));
  return error;
}

function messageOf(fields) {
  return typeof fields?.message === "string" && fields.message !== "" ? fields.message : null;
}

/** Seconds to wait by `Retry-After`, a number of seconds or a date. */
export function waitOf(response, now = Date.now()) {
  const value = response.headers.get("Retry-After");
  if (value === null) return DEFAULT_WAIT_S;
  const seconds = /^\d+$/.test(value) ? Number(value) : (Date.parse(value) - now) / 1000;
  return Number.isNaN(seconds) ? DEFAULT_WAIT_S : Math.min(Math.max(seconds, 1), LONGEST_WAIT_S);
}

function sleep(seconds, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, seconds * 1000);
    if (signal?.aborted) stop();
    else signal?.addEventListener("abort", stop, { once: true });
  });
}
