/** An answer, put together from the chunks of its stream. */

export class Answer {
  role = "assistant";
  content = "";
  reasoning = "";
  /** @type {{id: string, name: string, arguments: string}[]} */
  toolCalls = [];
  finishReason = null;
  timings = null;
  usage = null;
  /** @type {{total: number, cache: number, processed: number, time_ms: number} | null} */
  progress = null;
  stopped = false;
  /** One readable line, or null. */
  error = null;
  /** Milliseconds from the first to the last piece of reasoning, by the page's clock. */
  reasoningMs = 0;
  #reasoningSince = null;

  /** Adds a chunk that came at `now`, in milliseconds. */
  add(chunk, now) {
    if (chunk.timings) this.timings = chunk.timings;
    if (chunk.usage) this.usage = chunk.usage;
    if (chunk.prompt_progress) this.progress = chunk.prompt_progress;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    this.#addDelta(choice.delta ?? {}, now);
    if (choice.finish_reason) this.finishReason = choice.finish_reason;
  }

  #addDelta(delta, now) {
    const thought = delta.reasoning_content ?? delta.reasoning;
    if (thought) {
      this.reasoning += thought;
      this.#reasoningSince ??= now;
      this.reasoningMs = now - this.#reasoningSince;
    }
    if (delta.content) {
      if (this.content === "" && this.#reasoningSince !== null) {
        this.reasoningMs = now - this.#reasoningSince;
      }
      this.content += delta.content;
    }
    for (const piece of delta.tool_calls ?? []) this.#addToolCall(piece);
  }

  #addToolCall({ index = 0, id, function: called = {} }) {
    const call = (this.toolCalls[index] ??= { id: "", name: "", arguments: "" });
    if (id) call.id = id;
    if (called.name) call.name = called.name;
    call.arguments += called.arguments ?? "";
  }

  /** Whether nothing of the answer has come yet. */
  get empty() {
    return this.content === "" && this.reasoning === "" && this.toolCalls.length === 0;
  }

  /** Tokens of the context that are in use after this answer, or null if the server said nothing. */
  get contextUsed() {
    if (this.timings) {
      const { prompt_n = 0, cache_n = 0, predicted_n = 0 } = this.timings;
      return prompt_n + cache_n + predicted_n;
    }
    return this.usage ? this.usage.prompt_tokens + this.usage.completion_tokens : null;
  }

  /** The message that the next request sends as history. */
  toMessage() {
    const message = { role: "assistant", content: this.content };
    if (this.reasoning) message.reasoning_content = this.reasoning;
    if (this.toolCalls.length > 0) {
      message.tool_calls = this.toolCalls.map(({ id, name, arguments: text }) => ({
        id,
        type: "function",
        function: { name, arguments: text },
      }));
    }
    return message;
  }
}
