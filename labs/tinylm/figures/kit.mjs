// What the interactive figures share: labelled native controls, numbers in words, a text alternative that speaks once
// the reader rests, and a stand-in for anywidget's model on a page without a kernel.

const SVG = new Set(["svg", "g", "line", "circle", "path", "rect", "text"]);
let fields = 0;

/** A new HTML or SVG element. Attributes that are null or false are left out. */
export function element(tag, attributes = {}, ...children) {
  const node = SVG.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value != null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

/** A control under its label: {el, input, value}, where `value` is the place beside the label. */
function field(label, input) {
  input.id = `tinylm-field-${Date.now().toString(36)}-${fields++}`;
  const value = element("span", { class: "value", "aria-hidden": "true" });
  const head = element("div", { class: "head" }, element("label", { for: input.id }, label), value);
  return { el: element("div", { class: "field" }, head, input), input, value };
}

/** A slider over a list of sensible values; it also shows a value between them. `inWords(value)` is what it says. */
export function slider(label, values, inWords, onChange) {
  const { el, input, value } = field(label, element("input", { type: "range", min: 0, max: values.length - 1, step: 1 }));
  const show = (chosen) => {
    const distance = (v) => Math.abs(Math.log(v / chosen));
    input.value = values.reduce((best, v, i) => (distance(v) < distance(values[best]) ? i : best), 0);
    input.setAttribute("aria-valuetext", inWords(chosen));
    value.textContent = inWords(chosen);
  };
  input.addEventListener("input", () => {
    show(values[input.value]);
    onChange(values[input.value]);
  });
  return { el, show };
}

/** A drop-down list. `show(value, options)` takes pairs [value, text]. */
export function choice(label, onChange) {
  const { el, input } = field(label, element("select"));
  let values = [];
  input.addEventListener("change", () => onChange(values[input.selectedIndex]));
  const show = (chosen, options) => {
    values = options.map(([value]) => value);
    input.replaceChildren(...options.map(([, text]) => element("option", {}, text)));
    input.selectedIndex = values.indexOf(chosen);
    input.disabled = options.length < 2;
  };
  return { el, show };
}

/** A field for a whole number; empty it gives null. */
export function wholeNumber(label, onChange) {
  const { el, input } = field(label, element("input", { type: "number", min: 1, step: 1, inputmode: "numeric" }));
  input.addEventListener("input", () => onChange(input.value === "" ? null : Number(input.value)));
  let latest;
  const show = (value) => {
    latest = value;
    if (input.getRootNode().activeElement !== input) input.value = value; // never under the reader's hands
  };
  input.addEventListener("blur", () => (input.value = latest));
  return { el, show };
}

/** A number to three significant digits: 6.74 billion; 3.14 × 10²³. */
export function inWords(n) {
  const value = Number(n);
  if (value >= 1e15) {
    const [digits, power] = value.toExponential(2).split("e+");
    return `${digits} × 10${[...power].map((digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]).join("")}`;
  }
  return scaled(value, ["", "\u00a0thousand", "\u00a0million", "\u00a0billion", "\u00a0trillion"]);
}

/** Bytes in decimal units. */
export function inBytes(n) {
  return scaled(Number(n), ["\u00a0bytes", "\u00a0kB", "\u00a0MB", "\u00a0GB", "\u00a0TB", "\u00a0PB"]);
}

function scaled(value, units) {
  let power = Math.min(units.length - 1, Math.max(0, Math.floor(Math.log10(value) / 3)));
  if (Number((value / 1000 ** power).toPrecision(3)) >= 1000 && power < units.length - 1) power += 1;
  const short = value / 1000 ** power;
  return (short < 1000 ? String(Number(short.toPrecision(3))) : Math.round(short).toLocaleString("en")) + units[power];
}

/** A share of one, in per cent. */
export function percent(share) {
  return `${share < 0.001 && share > 0 ? (100 * share).toPrecision(1) : (100 * share).toFixed(1)}\u00a0%`;
}

/** Calls `f` when nothing has asked for it for a while, so that a screen reader hears a result and not each step to it. */
export function atRest(f, milliseconds = 600) {
  let timer;
  const later = (...values) => {
    clearTimeout(timer);
    timer = setTimeout(f, milliseconds, ...values);
  };
  later.cancel = () => clearTimeout(timer);
  return later;
}

/** Fills the element that a notebook or a page gives a figure. JupyterLab's shortcuts would take the arrow keys from it. */
export function frame(el, ...children) {
  el.classList.add("tinylm-figure");
  el.replaceChildren(...children);
  for (const control of el.querySelectorAll("button, input, select, summary")) control.dataset.lmSuppressShortcuts = "true";
}

/** Shows a figure on a page without a kernel: `values` is what the model would hold. */
export function mount(render, el, values, css) {
  if (!document.getElementById("tinylm-figure-style")) {
    document.head.append(element("style", { id: "tinylm-figure-style" }, css));
  }
  const heard = {};
  const model = {
    get: (key) => values[key],
    set(key, value) {
      values[key] = value;
      for (const f of heard[`change:${key}`] ?? []) f();
    },
    save_changes() {},
    on: (event, f) => (heard[event] = [...(heard[event] ?? []), f]),
    off: (event, f) => (heard[event] = (heard[event] ?? []).filter((g) => g !== f)),
  };
  render({ model, el });
}
