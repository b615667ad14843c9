// Elements made from plain data. Text is always a text node: nothing here, or anywhere in this
// folder, parses markup, so a prompt can hold any characters.
"use strict";

const SB = {};

(() => {
  const SVG = "http://www.w3.org/2000/svg";

  function fill(node, properties, children) {
    for (const [name, value] of Object.entries(properties ?? {})) {
      if (value === undefined || value === null) continue;
      if (name.startsWith("aria-")) node.setAttribute(name, String(value));
      else if (value === false) continue;
      else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (name === "style") for (const [key, word] of Object.entries(value)) node.style.setProperty(key, word);
      else if (name === "value" || name === "checked" || name === "disabled" || name === "selected") node[name] = value;
      else node.setAttribute(name, value === true ? "" : String(value));
    }
    for (const child of children.flat(Infinity)) {
      if (child === undefined || child === null || child === false) continue;
      node.append(child instanceof Node ? child : document.createTextNode(String(child)));
    }
    return node;
  }

  // Returns an element: el("p", {class: "note"}, "text", otherElement).
  SB.el = (tag, properties, ...children) => fill(document.createElement(tag), properties, children);

  // Returns an element of a drawing.
  SB.svg = (tag, properties, ...children) => fill(document.createElementNS(SVG, tag), properties, children);

  // Puts children in the place of those that a node has.
  SB.put = (node, ...children) => {
    node.replaceChildren(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
    return node;
  };

  SB.button = (words, onclick, properties) => SB.el("button", { type: "button", onclick, ...properties }, words);

  // Returns a select. Options are [value, words], or {label, options} for a group of them.
  SB.select = (label, options, value, onchange, properties) => {
    const option = ([name, words]) => SB.el("option", { value: name, selected: name === value }, words);
    const node = SB.el(
      "select",
      { "aria-label": label, onchange: () => onchange(node.value), ...properties },
      options.map((one) =>
        Array.isArray(one) ? option(one) : SB.el("optgroup", { label: one.label }, one.options.map(option))),
    );
    return node;
  };

  // Says something to people, and to those who hear the page.
  let clearing;
  SB.say = (words) => {
    const status = document.getElementById("status");
    status.textContent = words;
    status.classList.add("shown");
    clearTimeout(clearing);
    clearing = setTimeout(() => status.classList.remove("shown"), 3500);
  };

  SB.copy = async (text, what) => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // Not every browser lets a page from disk write to the clipboard that way.
      const area = SB.el("textarea", { class: "offscreen", value: text });
      (document.querySelector("dialog[open]") ?? document.body).append(area);
      area.select();
      const copied = document.execCommand("copy");
      area.remove();
      if (!copied) return SB.say(`The browser does not let this page copy the ${what}`);
    }
    return SB.say(`Copied the ${what}`);
  };

  // Returns the beginning of a text, for where nobody reads all of it.
  SB.short = (text) => (text && text.length > 300 ? `${text.slice(0, 300)}…` : text);

  SB.count = (number) => number.toLocaleString("en-US");
  SB.counted = (number, noun) => `${SB.count(number)} ${noun}${number === 1 ? "" : "s"}`;

  SB.isTyping = (event) => {
    const target = event.target;
    return target instanceof HTMLElement &&
      (target.matches("select, textarea, [contenteditable]") ||
        (target.matches("input") && !["checkbox", "radio", "button"].includes(target.type)));
  };

  // Returns a dialog that removes itself when it is closed.
  SB.dialog = (label, properties, ...children) => {
    const node = SB.el("dialog", { "aria-label": label, ...properties }, ...children);
    node.addEventListener("close", () => node.remove());
    document.body.append(node);
    return node;
  };
})();
