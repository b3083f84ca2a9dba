/**
 * Renders Markdown while it streams in. The model's text becomes text nodes only; the attributes
 * that depend on it are checked here: an `href` of http, https or mailto, and the `start` of a list.
 */

import { copyButton, element } from "./dom.js";
import * as smd from "./smd.js";

const TAGS = {
  [smd.PARAGRAPH]: "p",
  [smd.BLOCKQUOTE]: "blockquote",
  [smd.LINE_BREAK]: "br",
  [smd.RULE]: "hr",
  // The page itself has the headings of levels 1 and 2.
  [smd.HEADING_1]: "h3",
  [smd.HEADING_2]: "h4",
  [smd.HEADING_3]: "h5",
  [smd.HEADING_4]: "h6",
  [smd.HEADING_5]: "h6",
  [smd.HEADING_6]: "h6",
  [smd.ITALIC_AST]: "em",
  [smd.ITALIC_UND]: "em",
  [smd.STRONG_AST]: "strong",
  [smd.STRONG_UND]: "strong",
  [smd.STRIKE]: "s",
  [smd.CODE_INLINE]: "code",
  [smd.LIST_UNORDERED]: "ul",
  [smd.LIST_ORDERED]: "ol",
  [smd.LIST_ITEM]: "li",
  [smd.CHECKBOX]: "span",
  [smd.LINK]: "span",
  [smd.IMAGE]: "span",
  [smd.RAW_URL]: "span",
};

const VERBATIM = new Set([
  smd.CODE_BLOCK,
  smd.CODE_FENCE,
  smd.CODE_INLINE,
  smd.EQUATION_BLOCK,
  smd.EQUATION_INLINE,
  smd.RAW_URL,
]);

const LINKS = new Set(["http:", "https:", "mailto:"]);
const LANGUAGE_LENGTH = 30;

/** The address if a link may have it, else null. `text` is what stands in a link's parentheses. */
export function safeUrl(text) {
  const [, address] = /^\s*<?([^\s>]*)/.exec(text);
  try {
    const url = new URL(address);
    return LINKS.has(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

export class MarkdownStream {
  #root;
  #parser;
  #source = "";
  #held = "";
  #failed = false;

  /** @param {HTMLElement} root an empty element */
  constructor(root) {
    this.#root = root;
    this.#parser = smd.parser({
      data: new Tree(root),
      add_token: (tree, type) => tree.open(type),
      end_token: (tree) => tree.close(),
      add_text: (tree, text) => tree.text(text),
      set_attr: (tree, name, value) => tree.attribute(name, value),
    });
  }

  write(text) {
    this.#guarded(text, () => this.#feed(false));
  }

  end() {
    this.#guarded("", () => {
      this.#feed(true);
      smd.parser_end(this.#parser);
    });
  }

  /** Runs a step of the parser; if that fails, shows the source as it is. */
  #guarded(text, step) {
    this.#source += text;
    this.#held += text;
    if (!this.#failed) {
      try {
        step();
        return;
      } catch (error) {
        console.error(error);
        this.#failed = true;
      }
    }
    this.#root.replaceChildren(element("p", { class: "plain" }, this.#source));
  }

  /**
   * Hands on what is held. The parser takes any `$` before a letter as the start of an equation that
   * runs to the next one, however far away; so an equation is handed on only when it is closed on
   * its line, and any other `$` as text.
   */
  #feed(last) {
    while (this.#held !== "") {
      const at = this.#held.indexOf("$");
      if (at !== 0) {
        this.#pass(at === -1 ? this.#held.length : at);
      } else if (this.#verbatim()) {
        this.#pass(1);
      } else {
        const [opening] = /^\$\$?/.exec(this.#held);
        const rest = this.#held.slice(opening.length);
        const inner = /^[^$\n]*/.exec(rest)[0];
        const closed = inner !== "" && rest.startsWith(opening, inner.length);
        if (closed && isEquation(opening, inner)) {
          this.#pass(2 * opening.length + inner.length, `\\(${inner}\\)`);
        } else if (opening === "$$" && rest.startsWith("\n")) {
          this.#pass(3);
        } else if (closed || rest.includes("\n") || rest.includes(opening) || last) {
          this.#pass(opening.length, opening.replaceAll("$", "\\$"));
        } else {
          return;
        }
      }
    }
  }

  #pass(length, text = this.#held.slice(0, length)) {
    this.#held = this.#held.slice(length);
    // Characters one by one: the parser's result depends on where its input is cut.
    for (const char of text) smd.parser_write(this.#parser, char);
  }

  #verbatim() {
    const { tokens, len, pending } = this.#parser;
    return VERBATIM.has(tokens[len]) || pending.startsWith("`") || pending.startsWith("](");
  }
}

/** Of `$a$` and `$$a$$`: prices and names of variables have a digit first or a space at the end. */
function isEquation(delimiter, inner) {
  return delimiter === "$$" || (/^[^\s\d]/.test(inner) && /\S$/.test(inner));
}

/** The elements under construction, innermost last. */
class Tree {
  #open;

  constructor(root) {
    this.#open = [{ node: root, type: smd.DOCUMENT, linked: false }];
  }

  get #top() {
    return this.#open.at(-1);
  }

  open(type) {
    this.#open.push({ node: this.#make(type, this.#top.node), type, linked: false });
  }

  close() {
    const { node, type, linked } = this.#top;
    if (type === smd.DOCUMENT) return;
    this.#open.pop();
    if ((type === smd.LINK || type === smd.IMAGE) && !linked) unlink(node, type, "]");
  }

  text(text) {
    const { node } = this.#top;
    if (node.lastChild instanceof Text) node.lastChild.appendData(text);
    else node.append(text);
  }

  attribute(name, value) {
    const { node } = this.#top;
    if (name === smd.HREF || name === smd.SRC) this.#link(value);
    else if (name === smd.LANG) nameLanguage(node, value);
    else if (name === smd.START && /^\d{1,9}$/.test(value)) node.setAttribute("start", value);
    else if (name === smd.CHECKED) check(node);
  }

  #make(type, parent) {
    switch (type) {
      case smd.CODE_BLOCK:
      case smd.CODE_FENCE:
        return codeBlock(parent);
      case smd.EQUATION_INLINE:
        return parent.appendChild(element("code", { class: "math" }));
      case smd.EQUATION_BLOCK:
        return parent.appendChild(
          element("pre", { class: "math", tabindex: "0", role: "region", "aria-label": "Equation" }),
        );
      case smd.TABLE:
        return table(parent);
      case smd.TABLE_ROW:
        return tableRow(parent);
      case smd.TABLE_CELL:
        return parent.appendChild(element(parent.closest("thead") ? "th" : "td"));
      case smd.CHECKBOX:
        return parent.appendChild(
          element("span", { role: "img", "aria-label": "to do" }, "☐"),
        );
      default:
        return parent.appendChild(element(TAGS[type] ?? "span"));
    }
  }

  /** Makes a link of the innermost element, or leaves its source as text. */
  #link(value) {
    const top = this.#top;
    const image = top.type === smd.IMAGE;
    const raw = top.type === smd.RAW_URL;
    const href = safeUrl(raw ? value.replace(/[.,;:!?)\]}"'*>]+$/, "") : value);
    top.linked = true;
    if (href === null) {
      if (!raw) unlink(top.node, top.type, `](${value})`);
      return;
    }
    // The page must not be left: the conversation is in its memory only.
    const link = element("a", { href, target: "_blank", rel: "noopener noreferrer nofollow" });
    link.append(...top.node.childNodes);
    if (image) link.prepend(link.hasChildNodes() ? "Image: " : "Image");
    else if (!raw && !link.hasChildNodes()) link.append(href);
    top.node.replaceWith(link);
    top.node = link;
  }
}

/** Appends a block of code with a button that copies it; returns the element for its text. */
export function codeBlock(parent, language = "") {
  const code = element("code");
  parent.append(
    element(
      "figure",
      { class: "code" },
      element(
        "figcaption",
        {},
        element("span", {}, language),
        copyButton(() => code.textContent, "Copy code"),
      ),
      element("pre", { tabindex: "0" }, code),
    ),
  );
  return code;
}

/** Puts the source back in the place of a link: its text between brackets. */
function unlink(node, type, end) {
  node.replaceWith(type === smd.IMAGE ? "![" : "[", ...node.childNodes, end);
}

function nameLanguage(code, value) {
  const name = value.trim().split(/\s/)[0].slice(0, LANGUAGE_LENGTH);
  code.closest("figure").querySelector("figcaption span").textContent = name;
}

function check(node) {
  node.textContent = "☑";
  node.setAttribute("aria-label", "done");
}

function table(parent) {
  const node = element("table");
  const frame = { class: "table", tabindex: "0", role: "region", "aria-label": "Table" };
  parent.append(element("div", frame, node));
  return node;
}

/** The first row is the head, all others are the body. */
function tableRow(parent) {
  const part = !parent.tHead ? "thead" : "tbody";
  const section = (part === "tbody" && parent.tBodies?.[0]) || parent.appendChild(element(part));
  return section.appendChild(element("tr"));
}
