/** Server-sent events from the body of a `fetch`. (EventSource cannot POST.) */

/**
 * Yields the data of each event; comment lines and other fields are ignored. An event that the end
 * of the stream cuts off is dropped.
 * @param {ReadableStream<Uint8Array>} body
 * @returns {AsyncGenerator<string>}
 */
export async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      text += decoder.decode(value, { stream: true });
      const blocks = text.split(/\r?\n\r?\n/);
      text = blocks.pop();
      for (const block of blocks) {
        const data = dataOf(block);
        if (data !== null) yield data;
      }
    }
  } finally {
    // A reader that stops early closes the connection, which ends the generation.
    reader.cancel().catch(() => {});
  }
}

/** The lines of data of one event joined, or null if it has none. */
function dataOf(block) {
  const lines = block
    .split(/\r?\n/)
    .filter((line) => line.startsWith("data:"))
    .map((line) => line.slice(line.startsWith("data: ") ? 6 : 5));
  return lines.length > 0 ? lines.join("\n") : null;
}
