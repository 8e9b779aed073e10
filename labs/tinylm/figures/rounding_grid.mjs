// Real weights under the grid of a format, and what one outlier does to the grid of its group.
// rounding_grid.py has the same numbers in NumPy, the weights, the codebooks and the choices.
import { atRest, choice, element, frame, percent, slider } from "./kit.mjs";

const BITS = [2, 3, 4, 5, 6, 7, 8];
const BYTES = { absmax: 2, affine: 3, nf4: 4, fp4: 2 }; // stored beside a group's codes: its scale, its zero point
const [LEFT, RIGHT] = [-6, 16.5], BIN = 0.25; // what the picture spans, in standard deviations

const three = (x) => String(Number(x.toPrecision(3)));
const sigmas = (x) => `${x < 0 ? "−" : ""}${three(Math.abs(x))}\u00a0σ`;
const SHOWN = [
  ["bits_per_weight", "Bits a weight, with scales", (x) => String(Number(x.toFixed(3)))],
  ["snr_db", "Signal to error", (x) => `${x.toFixed(1)}\u00a0dB`],
  ["rms_error", "Error (root mean square)", sigmas],
  ["rms_error_marked", "Error in the marked group", sigmas],
  ["levels_used", "Levels used in that group", (x, q) => `${x} of ${q.levels}`],
  ["rms_error_elsewhere", "Error in other groups", sigmas],
  ["zeros", "Weights that become\u00a00", percent],
];

const comma = (n) => n.toLocaleString("en");
const same = (a, b) => Object.keys(a).every((key) => a[key] === b[key]);
const float = Math.fround;

/** The nearest integer; halfway between two, the even one. */
function whole(x) {
  const up = Math.round(x);
  return up - x === 0.5 && up % 2 !== 0 ? up - 1 : up;
}

/** The nearest float16 to a number that is at least 0; halfway, the even one. */
export function half(x) {
  let step = 2 ** -24;
  while (2048 * step <= x) step *= 2;
  const rounded = whole(x / step) * step;
  return rounded < 65520 ? rounded : Infinity;
}

/** Why a state cannot be, in a sentence, or null. */
export function problem(s, data) {
  if (!data.formats.some(([name]) => name === s.format)) return `There is no format ${s.format}.`;
  if (!BITS.includes(s.bits)) return "The bits must be a whole number from 2 to 8.";
  if (s.format in data.codebooks && s.bits !== 4) return "This format has codes of 4 bits.";
  if (!data.group_sizes.includes(s.group_size)) return "The groups must have one of the sizes that divide the weights.";
  const placed = typeof s.outlier === "number" && s.outlier >= 0 && s.outlier <= data.farthest;
  return placed ? null : `The marked weight must stand at 0 to ${data.farthest} standard deviations.`;
}

/** The weights, the marked one where the state puts it. All are exact in float32. */
function weights(s, data) {
  const w = data.weights.split(" ").map((units) => units * data.unit);
  if (s.outlier) w[data.marked] = float(s.outlier * data.sigma);
  return w;
}

/** A group's levels, and of each of its weights the index of the level that is nearest; see `rounding` in the Python. */
function round(w, s, data) {
  const low = Math.min(0, ...w), high = Math.max(0, ...w), largest = Math.max(-low, high);
  const book = data.codebooks[s.format];
  if (book) {
    const normal = s.format === "nf4", scale = normal ? largest : half(float(largest / 6));
    const middles = book.slice(1).map((value, i) => float((value + book[i]) / 2));
    const nearest = (weight) => {
      const x = float(normal ? weight * float(1 / scale) : weight / scale);
      const i = middles.filter((middle) => middle < x).length;
      return !normal && x === middles[i] && i % 2 === 0 ? i + 1 : i;
    };
    return { levels: book.map((value) => float(value * scale)), index: w.map(nearest) };
  }
  const symmetric = s.format === "absmax", steps = 2 ** s.bits - (symmetric ? 2 : 1);
  const scale = half(float(symmetric ? largest / (steps / 2) : float(high - low) / steps));
  const zero = symmetric ? steps / 2 : whole(float(-low / scale));
  return {
    levels: Array.from({ length: steps + 1 }, (_, code) => float((code - zero) * scale)),
    index: w.map((x) => Math.min(steps, Math.max(0, whole(float(x / scale)) + zero))),
  };
}

function rounding(s, data) {
  const w = weights(s, data), groups = [];
  for (let i = 0; i < w.length; i += s.group_size) groups.push(round(w.slice(i, i + s.group_size), s, data));
  return { w, groups, marked: Math.floor(data.marked / s.group_size) };
}

/** All numbers of the figure; errors in standard deviations of the weights. Throws on a state that cannot be. */
export function numbers(s, data) {
  const wrong = problem(s, data);
  if (wrong) throw new RangeError(wrong);
  return measure(s, data, rounding(s, data));
}

function measure(s, data, { w, groups, marked }) {
  let signal = 0, elsewhere = 0, here = 0, zeros = 0;
  w.forEach((x, i) => {
    const group = Math.floor(i / s.group_size), { levels, index } = groups[group];
    const rounded = levels[index[i % s.group_size]], error = (x - rounded) ** 2;
    signal += x * x;
    zeros += rounded === 0;
    if (group === marked) here += error;
    else elsewhere += error;
  });
  const rms = (total, n) => Math.sqrt(total / n) / data.sigma, others = w.length - s.group_size;
  return {
    bits_per_weight: s.bits + (8 * BYTES[s.format]) / s.group_size,
    rms_error: rms(here + elsewhere, w.length),
    snr_db: 10 * Math.log10(signal / (here + elsewhere)),
    rms_error_marked: rms(here, s.group_size),
    rms_error_elsewhere: others ? rms(elsewhere, others) : null,
    levels: groups[marked].levels.length,
    levels_used: new Set(groups[marked].index).size,
    zeros: zeros / w.length,
  };
}

// The picture: a histogram, and below it a row of ticks for each group (for neighbours of the marked one, if they are many).
const TOP = 22, BASE = 172, RAILS = 200, BOTTOM = 312, ROWS = 24;
const at = (x) => `${(100 * (x - LEFT)) / (RIGHT - LEFT)}%`;
const inside = (x) => x >= LEFT && x <= RIGHT;

/** Vertical ticks at each of these places, as a path. */
const ticks = (places, y1, y2) => places.filter(inside).map((x) => `M${x.toFixed(4)} ${y1}V${y2}`).join("");

function histogram(w) {
  const counts = new Array(Math.ceil((RIGHT - LEFT) / BIN)).fill(0);
  for (const x of w) counts[Math.floor((x - LEFT) / BIN)] += 1;
  const top = (n) => BASE - Math.min(0.75 * n, BASE - TOP); // 0.75: of 1,536 weights, some 160 in the fullest bin
  return `M${LEFT} ${BASE}${counts.map((n, i) => `V${top(n)}H${LEFT + BIN * (i + 1)}`).join("")}V${BASE}Z`;
}

function picture(s, data, { w, groups, marked }) {
  const x = w.map((weight) => weight / data.sigma), place = x[data.marked], right = place > 5;
  const inSigmas = ({ levels }) => levels.map((level) => level / data.sigma);
  const used = new Set(groups[marked].index), grid = inSigmas(groups[marked]);
  const first = Math.max(0, Math.min(marked - ROWS / 3, groups.length - ROWS));
  const shown = groups.slice(first, first + ROWS), height = (BOTTOM - RAILS) / Math.max(4, shown.length);
  const rails = shown.map((group, i) => ticks(inSigmas(group), RAILS + height * (i + 0.15), RAILS + height * (i + 0.85)));
  const here = marked - first;
  const count = groups.length === 1 ? "one grid for all" : `${groups.length} groups, a grid each`;
  const window = shown.length < groups.length ? ` (${shown.length} shown)` : "";
  const fine = grid.length > 40 ? "fine" : ""; // many levels are drawn as thin lines
  const lines = (kind, d) => element("path", { class: `${kind} ${fine}`, d });
  const text = { x: at(place), dx: right ? -9 : 9, y: 14, "text-anchor": right ? "end" : "start" };
  return [
    element(
      "svg",
      { width: "100%", height: BOTTOM, viewBox: `${LEFT} 0 ${RIGHT - LEFT} ${BOTTOM}`, preserveAspectRatio: "none" },
      element("path", { class: "area", d: histogram(x) }),
      element("g", { class: "others" }, lines("grid", rails.filter((_, i) => i !== here).join(""))),
      element(
        "g",
        { class: "chosen" },
        lines("grid unused", ticks(grid.filter((_, i) => !used.has(i)), TOP, BASE)),
        lines("grid", ticks(grid.filter((_, i) => used.has(i)), TOP, BASE) + rails[here]),
      ),
    ),
    element(
      "g",
      { class: "chosen" },
      element("line", { x1: at(place), x2: at(place), y1: 10, y2: BASE, class: "stem" }),
      element("circle", { cx: at(place), cy: 10, r: 4 }),
      element("text", text, s.outlier ? `marked weight, ${sigmas(place)}` : "marked weight, as trained"),
    ),
    element("text", { x: "100%", y: RAILS - 8, "text-anchor": "end" }, count + window),
  ];
}

function axis() {
  const marks = [-5, 0, 5, 10, 15];
  return element(
    "g",
    {},
    ...marks.map((x) => element("line", { x1: at(x), x2: at(x), y1: TOP, y2: BOTTOM + 4 })),
    element("line", { x1: 0, x2: "100%", y1: BASE, y2: BASE }),
    ...marks.map((x) => element("text", { x: at(x), y: BOTTOM + 19, "text-anchor": "middle" }, x ? sigmas(x) : "0")),
  );
}

/** The picture and the numbers in words. */
function describe(s, q, data, { w, groups, marked }) {
  const [, format] = data.formats.find(([name]) => name === s.format);
  const { levels } = groups[marked], ends = [levels[0], levels.at(-1)].map((level) => sigmas(level / data.sigma));
  const place = sigmas(w[data.marked] / data.sigma), others = groups.length - 1;
  const sharing = others ? `a scale for each ${s.group_size} of ${comma(w.length)} weights` : `one scale for all ${comma(w.length)} weights`;
  const apart = others === 1 ? "the other" : `the ${others} others`;
  const where = others ? `: ${sigmas(q.rms_error_marked)} in this group, ${sigmas(q.rms_error_elsewhere)} in ${apart}` : "";
  return [
    `${format} of ${s.bits} bits, ${sharing}: ${SHOWN[0][2](q.bits_per_weight)} bits a weight in all. `,
    `The marked weight ${s.outlier ? `was put at ${place}` : `is at ${place}, as trained`}; the ${q.levels} levels of its `,
    `${others ? "group" : "grid"} run from ${ends[0]} to ${ends[1]}, and ${q.levels_used} are used. `,
    `The root mean square error is ${sigmas(q.rms_error)}${where}; signal to error ${SHOWN[1][2](q.snr_db)}. `,
    `${percent(q.zeros)} of the weights become zero.`,
  ].join("");
}

function render({ model, el }) {
  const data = model.get("data");
  let state = model.get("state");

  const change = (changes) => {
    state = { ...state, ...changes };
    if (state.format in data.codebooks) state.bits = 4;
    show();
    model.set("state", state);
    model.save_changes();
  };
  const to = (name) => (value) => change({ [name]: value });

  const row = data.group_sizes[1];
  const sizes = (n) => (n > row ? `all ${comma(n)}` : n === row ? `${n}, a row` : String(n));
  const places = [0, ...Array.from({ length: data.farthest - 3 }, (_, i) => i + 4)];
  const format = choice("Format", to("format"));
  const bits = slider("Bits of a code", BITS, (n) => (state.format in data.codebooks ? `${n}, fixed` : String(n)), to("bits"));
  const group = slider("Group size", data.group_sizes, sizes, to("group_size"));
  const outlier = slider("Marked weight", places, (n) => (n ? sigmas(n) : "as trained"), to("outlier"));
  const presets = data.presets.map(({ name, state }) => {
    const button = element("button", { type: "button" }, name);
    button.addEventListener("click", () => change(state));
    return { button, state };
  });
  const outputs = SHOWN.map(([key, label, format]) => {
    const place = element("output", { "data-quantity": key, "aria-live": "off" }); // the words below speak, once
    return { key, format, place, el: element("div", {}, element("dt", {}, label), element("dd", {}, place)) };
  });
  const drawn = element("g");
  const words = element("p", { class: "words", "aria-live": "polite" });
  const say = atRest((text) => (words.textContent = text));

  function show() {
    const result = rounding(state, data), q = measure(state, data, result);
    for (const preset of presets) preset.button.setAttribute("aria-pressed", same(preset.state, state));
    format.show(state.format, data.formats);
    bits.show(state.bits);
    bits.el.querySelector("input").disabled = state.format in data.codebooks;
    group.show(state.group_size);
    outlier.show(state.outlier);
    for (const { key, format, place } of outputs) {
      const nothing = q[key] === null;
      place.textContent = nothing ? "–" : format(q[key], q);
      if (nothing) delete place.dataset.value;
      else place.dataset.value = q[key];
    }
    drawn.replaceChildren(...picture(state, data, result));
    const text = describe(state, q, data, result);
    words.textContent ? say(text) : (words.textContent = text);
  }

  const key = (color, text) => element("span", { style: `--part: ${color}` }, text);
  frame(
    el,
    element("div", { class: "presets", role: "group", "aria-label": "Start from" }, ...presets.map(({ button }) => button)),
    element("div", { class: "fields pairs" }, format.el, bits.el, group.el, outlier.el),
    element(
      "div",
      { class: "picture", "aria-hidden": "true" },
      element("div", { class: "title" }, "Weights and levels, in standard deviations σ (pale: unused)"),
      element("svg", { width: "100%", height: BOTTOM + 26 }, axis(), drawn),
      element(
        "div",
        { class: "legend" },
        key("var(--muted)", "weights"),
        key("var(--chosen)", "levels of the marked weight's group"),
        key("var(--blue)", "levels of other groups"),
      ),
    ),
    element("dl", { class: "numbers" }, ...outputs.map((output) => output.el)),
    words,
  );
  show();
  const moved = () => {
    if (state === model.get("state")) return;
    state = model.get("state");
    show();
  };
  model.on("change:state", moved);
  return () => {
    model.off("change:state", moved);
    say.cancel();
  };
}

export default { render };
