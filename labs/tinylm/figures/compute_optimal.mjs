// A fitted law L(N, D) = E + A / N^alpha + B / D^beta: how it shares a budget of operations, and what another share costs.
// compute_optimal.py has the same numbers, the published laws, the presets and the peaks of the GPUs.
import { choice, element, follow, frame, inWords, numberList, power, slider, startButtons, words } from "./kit.mjs";

// The sliders' steps.
const BUDGETS = Array.from({ length: 52 }, (_, i) => Number(`${[1, 2, 5][i % 3]}e${10 + Math.floor(i / 3)}`));
const ROUND = [1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12.5, 15, 20, 25, 30];
const TIMES = [...ROUND.slice(1).reverse().map((x) => 1 / x), ...ROUND]; // of the best size
const PRICES = [0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10];
const SHARES = Array.from({ length: 18 }, (_, i) => (i + 1) / 20);

const three = (x) => (x === 0 || (x >= 1e-3 && x < 1e4) ? String(Number(x.toPrecision(3))) : power(x));
const dollars = (x) => `$${x < 1000 ? three(x) : inWords(x)}`;
const LETTERS = { thousand: "k", million: "M", billion: "B", trillion: "T" };
const short = (n) => (n < 1 ? three(n) : inWords(n).replace(/[a-z]+/, (unit) => LETTERS[unit]));
const capital = (text) => text[0].toUpperCase() + text.slice(1);
const SHOWN = [
  ["best_params", "Best size", inWords],
  ["best_tokens", "Best number of tokens", inWords],
  ["best_ratio", "Tokens a parameter, best", three],
  ["best_loss", "Least loss", (x) => x.toFixed(3)],
  ["params", "This size", inWords],
  ["tokens", "Its number of tokens", inWords],
  ["ratio", "Tokens a parameter, this", three],
  ["loss", "Its loss", (x) => x.toFixed(3)],
  ["cost", "Cost, at an assumed price", dollars],
  ["exaflop_cost", "10¹⁸ operations cost", dollars],
  ["waste", "Operations, against the least for this loss", (x) => `× ${three(x)}`],
  ["excess", "Loss above the least", three],
];

const known = (s, data) => ({ ...data.laws, ...s.own });
const between = (x, low, high) => typeof x === "number" && x >= low && x <= high;

/** Parameters and tokens of least loss under 6 N D = flops. */
function share(law, flops) {
  const { A, B, alpha: a, beta: b } = law;
  const n = ((a * A) / (b * B)) ** (1 / (a + b)) * (flops / 6) ** (b / (a + b));
  return [n, flops / 6 / n];
}

/** The loss less E. */
const aboveFloor = (law, n, d) => law.A * n ** -law.alpha + law.B * d ** -law.beta;

/** The largest factor by which a run lies outside what the fitted runs covered, or 1. */
function beyond(law, n, d) {
  const values = Object.entries({ params: n, tokens: d, flops: 6 * n * d });
  const factor = Math.max(...values.flatMap(([key, v]) => [law[key][0] / v, v / law[key][1]]));
  return factor > 1 + 1e-9 ? factor : 1;
}

/** Why a state cannot be, in a sentence, or null. */
export function problem(s, data) {
  const law = known(s, data)[s.law];
  if (!law) return `There is no law called ${s.law}.`;
  if (!(s.gpu in data.gpus)) return `There is no GPU called ${s.gpu}.`;
  if (!between(s.flops, ...data.budgets)) return "The budget must lie between 10¹⁰ and 10²⁷ operations.";
  if (!between(s.price, 0.01, 100)) return "An hour must cost from 1 cent to 100 dollars.";
  if (!between(s.utilisation, 0.01, 1)) return "The utilisation must lie between 1 and 100 per cent.";
  const [best] = share(law, s.flops), slack = 1 + 1e-9;
  if (s.params === null || between(s.params, best / data.span / slack, best * data.span * slack)) return null;
  return `The size must be within ${data.span} times the best, either way.`;
}

/** All numbers of the figure; losses in nats per token. Throws on a state that cannot be. */
export function numbers(s, data) {
  const wrong = problem(s, data);
  if (wrong) throw new RangeError(wrong);
  const law = known(s, data)[s.law], [bestN, bestD] = share(law, s.flops);
  const n = s.params ?? bestN, d = s.flops / 6 / n;
  const least = aboveFloor(law, bestN, bestD), here = aboveFloor(law, n, d);
  const price = s.price / 3600 / (data.gpus[s.gpu] * s.utilisation); // of an operation
  return {
    best_params: bestN,
    best_tokens: bestD,
    best_ratio: bestD / bestN,
    best_loss: law.E + least,
    params: n,
    tokens: d,
    ratio: d / n,
    loss: law.E + here,
    excess: here - least,
    waste: (here / least) ** (1 / law.alpha + 1 / law.beta),
    cost: price * s.flops,
    exaflop_cost: price * 1e18,
    beyond: beyond(law, n, d),
  };
}

// The picture: loss against the logarithm of N. Its window follows the budget, a little more slowly than the best size does,
// so that this moves to the right and down while the scale slides to the left below it.
const TOP = 8, BASE = 292, FLOOR = 274, DECADES = 5, STEPS = 160;

function windowOf(s, q, law, data) {
  const [low, high] = data.budgets.map(Math.log10), t = (Math.log10(s.flops) - low) / (high - low);
  const left = Math.log10(q.best_params) - DECADES * (0.38 + 0.24 * t);
  const height = Math.max((2.1 + 0.7 * t) * (q.best_loss - law.E), 1.25 * (q.loss - law.E)); // of the loss above E
  return {
    left,
    height,
    share: (n) => (Math.log10(n) - left) / DECADES,
    x: (n) => `${(100 * (Math.log10(n) - left)) / DECADES}%`,
    y: (loss) => FLOOR - ((FLOOR - TOP) * (loss - law.E)) / height,
    sizes: Array.from({ length: STEPS + 1 }, (_, i) => 10 ** (left + (DECADES * i) / STEPS)),
  };
}

/** A curve in two paths: where the fitted runs cover it, and beyond. `tokens(n)` says how many tokens a size has. */
function curve(law, w, tokens, kind) {
  const points = w.sizes.map((n, i) => {
    const d = tokens(n);
    return { at: `${i} ${Math.max(-500, w.y(law.E + aboveFloor(law, n, d))).toFixed(2)}`, inside: beyond(law, n, d) === 1 };
  });
  const pieces = { solid: "", dashed: "" };
  for (let i = 0; i < STEPS; i++) {
    const [a, b] = [points[i], points[i + 1]], piece = a.inside && b.inside ? "solid" : "dashed";
    pieces[piece] += pieces[piece].endsWith(a.at) ? `L${b.at}` : `M${a.at}L${b.at}`;
  }
  return Object.entries(pieces).map(([piece, d]) => element("path", { class: `curve ${kind} ${piece}`, d }));
}

/** The tokens that are best for a size. */
const bestTokens = ({ A, B, alpha, beta }) => (n) => (((beta * B) / (alpha * A)) * n ** alpha) ** (1 / beta);

/** A length of 1, 2 or 5 times a power of ten, of which about four fit. */
function step(length) {
  const ten = 10 ** Math.floor(Math.log10(length / 4));
  return [1, 2, 5, 10].map((x) => x * ten).find((x) => length / x < 5.5);
}

function scales(law, w) {
  const decades = Array.from({ length: DECADES }, (_, i) => Math.ceil(w.left + 0.001) + i);
  const size = step(w.height), places = Math.max(0, -Math.floor(Math.log10(size) + 1e-9));
  const first = Math.floor(law.E / size) + 1, losses = [];
  for (let k = first; k * size < law.E + w.height; k++) if (w.y(k * size) < FLOOR - 24) losses.push(k * size);
  return element(
    "g",
    {},
    ...decades.map((k) => element("line", { x1: w.x(10 ** k), x2: w.x(10 ** k), y1: BASE, y2: BASE + 5 })),
    ...decades
      .filter((k) => w.share(10 ** k) > 0.04 && w.share(10 ** k) < 0.94)
      .map((k) => element("text", { x: w.x(10 ** k), y: BASE + 19, "text-anchor": "middle" }, short(10 ** k))),
    ...losses.map((loss) => element("line", { x1: 0, x2: "100%", y1: w.y(loss), y2: w.y(loss) })),
    ...losses.map((loss) => element("text", { x: 0, y: w.y(loss) - 4 }, loss.toFixed(places))),
    element("line", { x1: 0, x2: "100%", y1: BASE, y2: BASE }),
    element("line", { x1: 0, x2: "100%", y1: FLOOR, y2: FLOOR, class: "limit" }),
    element("text", { x: 0, y: FLOOR - 5 }, `floor E = ${law.E.toFixed(2)}`),
  );
}

/** The model that the reader has chosen, and on a level with it the best one of the same loss. */
function chosen(law, q, w) {
  const { alpha, beta, A, E } = law, y = w.y(q.loss);
  const size = ((A * (1 + alpha / beta)) / (q.loss - E)) ** (1 / alpha), inside = w.share(size) > 0;
  const equal = inside ? w.x(size) : "0%", x = w.x(q.params);
  const middle = (parseFloat(equal) + parseFloat(x)) / 2, side = middle < 24 ? 0 : middle > 76 ? 2 : 1; // not over the edge
  const place = { x: `${[0, middle, 100][side]}%`, "text-anchor": ["start", "middle", "end"][side] };
  return element(
    "g",
    { class: "chosen" },
    element("line", { x1: equal, x2: x, y1: y, y2: y, class: "stem" }),
    ...(inside ? [element("circle", { cx: equal, cy: y, r: 4, class: "hollow" })] : []),
    element("circle", { cx: x, cy: y, r: 5 }),
    element("text", { ...place, y: y - 24 }, `this size: ${short(q.params)}`),
    element("text", { ...place, y: y - 8 }, `× ${three(q.waste)} operations`),
  );
}

function picture(s, q, data) {
  const law = known(s, data)[s.law], w = windowOf(s, q, law, data);
  const equal = (flops) => (n) => flops / 6 / n;
  const others = [];
  for (let c = data.budgets[0]; c <= data.budgets[1]; c *= 100) others.push({ c, n: share(law, c)[0] });
  const near = others.filter(({ n }) => Math.abs(w.share(n) - 0.5) < 1);
  const named = near.filter(({ n }) => w.share(n) > 0.05 && w.share(n) < 0.9 && Math.abs(Math.log10(n / q.best_params)) > 0.6);
  const x = w.x(q.best_params), y = w.y(q.best_loss);
  return [
    scales(law, w),
    element(
      "svg",
      {
        width: "100%",
        height: BASE,
        viewBox: `0 0 ${STEPS} ${BASE}`,
        preserveAspectRatio: "none",
        style: "overflow: hidden",
      },
      element(
        "g",
        { class: "known" },
        ...near.flatMap(({ c }) => curve(law, w, equal(c), "faint")),
        ...curve(law, w, bestTokens(law), "optima"),
      ),
      element("g", { class: "others" }, ...curve(law, w, equal(s.flops), "main")),
    ),
    ...named
      .map(({ c, n }) => ({ c, x: w.x(n), y: w.y(law.E + aboveFloor(law, n, c / 6 / n)) }))
      .filter(({ y }) => y > TOP + 16)
      .map(({ c, x, y }) => element("text", { class: "known", x, dx: 4, y: y - 6 }, power(c))),
    element(
      "g",
      { class: "others best" },
      element("circle", { cx: x, cy: y, r: 5 }),
      element("text", { x, dx: 14, y: y + 21, "text-anchor": "end" }, `best: ${short(q.best_params)}`),
    ),
    ...(s.params === null ? [] : [chosen(law, q, w)]),
  ];
}

/** The picture and the numbers in words. */
function describe(s, q, data) {
  const law = known(s, data)[s.law], tokens = `${law.token}s`;
  const where = q.beyond > 1 ? `beyond the fitted runs by a factor of ${three(q.beyond)}` : "within what the fitted runs covered";
  const other = [
    `A model of ${inWords(q.params)} parameters sees ${inWords(q.tokens)} ${tokens}: ${three(q.excess)} nats more, `,
    `which the best share reaches with the operations divided by ${three(q.waste)}. `,
  ];
  return [
    `By the law of ${s.law}, ${power(s.flops)} operations are best spent on ${inWords(q.best_params)} parameters and `,
    `${inWords(q.best_tokens)} ${tokens}, ${three(q.best_ratio)} a parameter; loss ${q.best_loss.toFixed(3)}, the floor `,
    `${law.E.toFixed(2)}. ${s.params === null ? "" : other.join("")}This is ${where}. It costs ${dollars(q.cost)}, at an assumed `,
    `${dollars(s.price)} an hour for a GPU (${s.gpu}) that does ${Math.round(100 * s.utilisation)}\u00a0% of its `,
    `${data.gpus[s.gpu] / 1e12}\u00a0TFLOP/s.`,
  ].join("");
}

function render({ model, el }) {
  const data = model.get("data");
  let state = model.get("state");
  const bestSize = (s) => share(known(s, data)[s.law], s.flops)[0];

  const change = (changes) => {
    const next = { ...state, ...changes };
    if (next.params !== null && next.law in known(next, data)) {
      const best = bestSize(next); // the size stays what it is as long as the picture can show it
      next.params = Math.min(best * data.span, Math.max(best / data.span, next.params));
    }
    if (problem(next, data)) return;
    state = next;
    show();
    model.set("state", state);
    model.save_changes();
  };
  const to = (name) => (value) => change({ [name]: value });
  const resize = (ratio) => change({ params: ratio === 1 ? null : ratio * bestSize(state) });

  const ratio = (s) => (s.params === null ? 1 : s.params / bestSize(s));
  const times = (r) => (r === 1 ? "the best" : `best ${r > 1 ? "×" : "/"}\u00a0${three(Math.max(r, 1 / r))}`);
  const law = choice("Law", to("law"));
  const budget = slider("Budget", BUDGETS, (c) => `${power(c)} operations`, to("flops"));
  const size = slider("Model size", TIMES, times, resize);
  const gpu = choice("GPU", to("gpu"));
  const price = slider("Price of a GPU hour", PRICES, dollars, to("price"));
  const use = slider("Utilisation of its peak", SHARES, (x) => `${Math.round(100 * x)}\u00a0%`, to("utilisation"));
  const ours = Object.entries(state.own).map(([law, { flops }]) => ({
    name: capital(law),
    state: { law, flops: Math.min(data.budgets[1], Math.max(data.budgets[0], flops[1])), params: null },
  }));
  const starts = startButtons([...data.presets, ...ours], change);
  const shown = numberList(SHOWN);
  shown.el.classList.add("four");
  const title = element("div", { class: "title noted" });
  const far = element("output", { "data-quantity": "beyond", "aria-live": "off" });
  const drawn = element("g");
  const told = words();

  function show() {
    const q = numbers(state, data), laws = known(state, data);
    starts.show(state);
    law.show(state.law, Object.keys(laws).map((name) => [name, capital(name)]));
    budget.show(state.flops);
    size.show(ratio(state));
    gpu.show(state.gpu, Object.entries(data.gpus).map(([name, peak]) => [name, `${name}, ${peak / 1e12} TFLOP/s`]));
    price.show(state.price);
    use.show(state.utilisation);
    shown.show(q);
    title.textContent = `Loss (nats per ${laws[state.law].token}) against parameters`;
    far.textContent = q.beyond > 1 ? `beyond by a factor of ${three(q.beyond)}` : "within them";
    far.dataset.value = q.beyond;
    drawn.replaceChildren(...picture(state, q, data));
    told.show(describe(state, q, data));
  }

  const svg = element("svg", { class: "draggable", width: "100%", height: BASE + 26 }, drawn);
  const drag = (event) => {
    const box = svg.getBoundingClientRect(), q = numbers(state, data);
    const w = windowOf(state, q, known(state, data)[state.law], data);
    const wanted = 10 ** (w.left + (DECADES * (event.clientX - box.left)) / box.width) / q.best_params;
    const far = (x) => Math.abs(Math.log(x / wanted));
    resize(TIMES.reduce((best, x) => (far(x) < far(best) ? x : best)));
  };
  svg.addEventListener("pointerdown", (event) => svg.setPointerCapture(event.pointerId));
  svg.addEventListener("pointermove", (event) => svg.hasPointerCapture(event.pointerId) && drag(event));
  svg.addEventListener("click", drag); // and not the start of a finger's stroke, which may scroll the page

  frame(
    el,
    starts.el,
    element("div", { class: "fields" }, law.el, budget.el, size.el),
    element(
      "details",
      {},
      element("summary", {}, "The price of an operation (assumed)"),
      element("div", { class: "fields" }, gpu.el, price.el, use.el),
    ),
    title,
    element(
      "div",
      { class: "note" },
      element("div", {}, "Blue: this budget. Grey: others, and the line of their best sizes. Dashed: beyond the fitted runs."),
      element("div", {}, "This point is ", far, "."),
    ),
    element("div", { class: "picture", "aria-hidden": "true" }, svg),
    shown.el,
    told.el,
  );
  show();
  const leave = follow(model, () => state, (other) => {
    state = other;
    show();
  });
  return () => {
    leave();
    told.cancel();
  };
}

export default { render };
