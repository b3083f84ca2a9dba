/** Builds elements without parsing markup, and copies text. */

/**
 * An element with attributes and children; a string child becomes a text node.
 * @param {string} tag
 * @param {Record<string, string>} [attributes]
 * @param {...(Node | string)} children
 */
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** A button that calls `action(button)`; `label` names it where its text alone says too little. */
export function button(text, action, label = text) {
  const node = element("button", { type: "button", class: "small", "aria-label": label }, text);
  node.addEventListener("click", () => action(node));
  return node;
}

/** A button that copies what `text()` returns, and says whether it did. */
export function copyButton(text, label) {
  let timer = 0;
  return button(
    "Copy",
    async (node) => {
      node.textContent = (await copy(text())) ? "Copied" : "Not copied";
      clearTimeout(timer);
      timer = setTimeout(() => (node.textContent = "Copy"), 2000);
    },
    label,
  );
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Browsers offer no clipboard to a page that came by http from another machine.
    return copyBySelection(text);
  }
}

function copyBySelection(text) {
  const focused = document.activeElement;
  const area = element("textarea", { class: "visually-hidden", readonly: "" });
  area.value = text;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return copied;
}
