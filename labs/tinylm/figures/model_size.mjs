// What a model's shape costs: parameters, operations, KV cache and memory, beside GPT-3 and LLaMA.
// model_size.py has the same numbers from tinylm, and the shapes to compare with.
import { atRest, choice, element, frame, inBytes, inWords, percent, slider, wholeNumber } from "./kit.mjs";

const WIDTHS = [32, 48, 64, 96, 128, 192, 256, 384, 512, 576, 640, 768, 1024, 1280, 1536, 2048, 2560, 3072, 4096, 5120, 6144, 8192, 10240, 12288, 16384];
const DEPTHS = [1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128];
const HEADS = [1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128];
const CONTEXTS = Array.from({ length: 13 }, (_, i) => 64 * 2 ** i);
const TOKENS = Array.from({ length: 23 }, (_, i) => [1, 2, 5][i % 3] * 10 ** (6 + Math.floor(i / 3)));

/** Channels inside the MLP: as chosen, else those that tinylm's Config (and GPT-3) takes for the width. */
export function hiddenWidth(s) {
  return s.hidden_dim ?? (s.block === "llama" ? 32 * Math.ceil(s.dim / 12) : 4 * s.dim);
}

/** Why a shape cannot be, in a sentence, or null. */
export function problem(s) {
  const whole = {
    width: s.dim,
    depth: s.n_layers,
    "number of query heads": s.n_heads,
    "number of key-value heads": s.n_kv_heads,
    "MLP width": hiddenWidth(s),
    vocabulary: s.vocab_size,
  };
  for (const [name, value] of Object.entries(whole)) {
    if (!Number.isSafeInteger(value) || value < 1) return `The ${name} must be a whole number of at least 1.`;
  }
  if (s.dim % s.n_heads) {
    return `A width of ${comma(s.dim)} does not divide evenly among ${s.n_heads} heads. Choose another width or number of heads.`;
  }
  if (s.block === "llama" && (s.dim / s.n_heads) % 2) {
    return `Each of the ${s.n_heads} heads would have ${s.dim / s.n_heads} channels, an odd number, and rotary embeddings turn pairs of channels. Choose another width or number of heads.`;
  }
  if (s.n_heads % s.n_kv_heads) {
    return `${s.n_heads} query heads cannot share ${s.n_kv_heads} key-value heads evenly. Choose a number of key-value heads that divides ${s.n_heads}.`;
  }
  return null;
}

/** All numbers of the figure, as BigInt: GPT-3's training takes more operations than a double counts exactly. */
export function counts(s) {
  const [v, c, n, h, g, f, t] = [s.vocab_size, s.dim, s.n_layers, s.n_heads, s.n_kv_heads, hiddenWidth(s), s.context].map(BigInt);
  const llama = s.block === "llama";
  const attention = n * (2n * c * c + 2n * c * g * (c / h));
  const mlp = n * (llama ? 3n : 2n) * c * f;
  const tables = (s.tie_embeddings ? 1n : 2n) * v * c + (llama ? 0n : t * c);
  const rest = llama ? (2n * n + 1n) * c : n * (9n * c + f) + 2n * c; // gains; or biases and LayerNorms
  const parameters = attention + mlp + tables + rest;
  const forward = 2n * (attention + mlp + v * c) + 4n * n * t * c; // a token; attention's whole square
  const out = {
    parameters,
    parameters_without_tables: parameters - tables,
    tables,
    attention,
    mlp,
    train_flops_per_token: 3n * forward,
    train_flops: 3n * forward * BigInt(s.tokens),
    decode_flops: forward,
    kv_cache_bytes: 2n * n * g * (c / h) * t * 2n,
  };
  for (const bits of [32, 16, 8, 4.5]) {
    out[`weight_bytes_${bits}`] = (parameters * BigInt(2 * bits) + 15n) / 16n; // whole bytes, rounded up
  }
  return out;
}

const comma = (n) => n.toLocaleString("en");
const divisors = (n) => Array.from({ length: n }, (_, i) => n - i).filter((d) => n % d === 0);
const same = (a, b) => Object.keys(a).every((key) => a[key] === b[key]);

const SHOWN = [
  ["parameters", "Parameters", inWords],
  ["parameters_without_tables", "Parameters without the tables", inWords],
  ["train_flops_per_token", "Training FLOPs a token", inWords],
  ["train_flops", "Training FLOPs in all", inWords],
  ["decode_flops", "FLOPs to generate a token", inWords],
  ["kv_cache_bytes", "KV cache, 16 bits", inBytes],
  ["weight_bytes_32", "Weights, 32 bits", inBytes],
  ["weight_bytes_16", "Weights, 16 bits", inBytes],
  ["weight_bytes_8", "Weights, 8 bits", inBytes],
  ["weight_bytes_4.5", "Weights, 4.5 bits", inBytes],
];
const PARTS = [["tables", "tables"], ["attention", "attention"], ["mlp", "MLP"]];

// The ruler: kilobytes to terabytes, ten decades across its whole width, whatever that is.
const ROW = 25, TOP = 24;
const at = (bytes) => `${10 * Math.min(9.9, Math.max(0.1, Math.log10(Number(bytes)) - 3))}%`;

function rulerRow(q, name, row, kind) {
  const y = TOP + ROW * (row + 0.5);
  const weights = ["4.5", "8", "16", "32"].map((bits) => q[`weight_bytes_${bits}`]);
  const marks = [...weights, q.kv_cache_bytes].map(Number);
  const toTheRight = Math.max(...marks) < 1e9;
  const edge = toTheRight ? Math.max(...marks) : Math.min(...marks);
  const text = { x: at(edge), dx: toTheRight ? 10 : -10, y: y + 4, "text-anchor": toTheRight ? "start" : "end" };
  return element(
    "g",
    { class: kind },
    element("line", { x1: at(weights[0]), x2: at(weights[3]), y1: y, y2: y }),
    ...weights.map((bytes) => element("circle", { cx: at(bytes), cy: y, r: 4 })),
    element("svg", { x: at(q.kv_cache_bytes), y, overflow: "visible" }, element("path", { d: "M-5 0 0-5 5 0 0 5Z", class: "cache" })),
    element("text", text, name),
  );
}

function rulerGround(rows, laptop) {
  const bottom = TOP + ROW * rows;
  const ticks = [[1e3, "1 kB", "start"], [1e6, "1 MB", "middle"], [1e9, "1 GB", "middle"], [1e12, "1 TB", "middle"]];
  return element(
    "g",
    { class: "ground" },
    ...ticks.map(([bytes]) => element("line", { x1: at(bytes), x2: at(bytes), y1: TOP, y2: bottom })),
    ...ticks.map(([bytes, text, anchor]) => element("text", { x: at(bytes), y: bottom + 17, "text-anchor": anchor }, text)),
    element("line", { x1: at(laptop), x2: at(laptop), y1: 4, y2: bottom, class: "laptop" }),
    element("text", { x: at(laptop), dx: -6, y: 15, "text-anchor": "end" }, "64 GB laptop"),
  );
}

/** The picture and the numbers in words. */
function describe(s, q, { shapes, laptop }) {
  const known = shapes.map(({ name, state }) => ({ name, q: counts(state) }));
  const ratio = (a, b) => Number(a) / Number(b);
  const far = ({ q: other }) => Math.abs(Math.log(ratio(q.parameters, other.parameters)));
  const nearest = known.reduce((best, one) => (far(one) < far(best) ? one : best));
  const size = ratio(q.parameters, nearest.q.parameters);
  const beside = far(nearest) < 0.005 ? "as many as" : size > 1 ? `${inWords(size)} times as many as` : `${percent(size)} of`;
  const shares = PARTS.map(([part, name]) => `${percent(ratio(q[part], q.parameters))} in ${part === "mlp" ? "the MLP" : part === "tables" ? "the tables" : name}`);
  const fitting = ["32", "16", "8", "4.5"].filter((bits) => Number(q[`weight_bytes_${bits}`]) <= laptop);
  const fits = fitting.length === 4 ? "at all four precisions" : fitting.length ? `from ${fitting[0]} bits down` : "at none of the four precisions";
  const largest = known.at(-1);
  const training = ratio(largest.q.train_flops, q.train_flops);
  const compared = Math.abs(training - 1) < 0.005 ? `as many as ${largest.name} took`
    : training > 1 ? `and ${largest.name} took ${inWords(training)} times as many` : `${inWords(1 / training)} times as many as ${largest.name} took`;
  return `${comma(s.n_layers)} ${s.n_layers === 1 ? "layer" : "layers"} of ${comma(s.dim)} channels have ${inWords(q.parameters)} parameters, `
    + `${beside} ${nearest.name}: ${shares.join(", ")}. `
    + `The weights take ${inBytes(q["weight_bytes_4.5"])} at 4.5 bits and ${inBytes(q.weight_bytes_32)} at 32; they fit a 64 GB laptop ${fits}. `
    + `The KV cache of ${comma(s.context)} tokens takes ${inBytes(q.kv_cache_bytes)}. `
    + `Training on ${inWords(s.tokens)} tokens takes ${inWords(q.train_flops)} operations (FLOPs), ${compared}.`;
}

function render({ model, el }) {
  const data = model.get("data");
  let draft = model.get("state");

  const change = (changes) => {
    const before = draft;
    draft = { ...draft, ...changes };
    if (("dim" in changes || "block" in changes) && !("hidden_dim" in changes)) draft.hidden_dim = null;
    if (before.n_kv_heads === before.n_heads && !("n_kv_heads" in changes)) draft.n_kv_heads = draft.n_heads;
    if (draft.block === "gpt3") Object.assign(draft, { n_kv_heads: draft.n_heads, tie_embeddings: true });
    show();
    if (problem(draft) === null) {
      model.set("state", draft);
      model.save_changes();
    }
  };
  const set = (name) => (value) => change({ [name]: value });

  const width = slider("Width", WIDTHS, (n) => `${comma(n)} channels`, set("dim"));
  const depth = slider("Depth", DEPTHS, (n) => `${n} ${n === 1 ? "layer" : "layers"}`, set("n_layers"));
  const heads = slider("Query heads", HEADS, (n) => `${n} ${n === 1 ? "head" : "heads"}`, set("n_heads"));
  const context = slider("Context", CONTEXTS, (n) => `${comma(n)} tokens`, set("context"));
  const trained = slider("Training tokens", TOKENS, inWords, set("tokens"));
  const shared = choice("Key-value heads", set("n_kv_heads"));
  const block = choice("Block", set("block"));
  const hidden = wholeNumber("MLP width (empty: follows the width)", set("hidden_dim"));
  const vocabulary = wholeNumber("Vocabulary", set("vocab_size"));
  const tied = choice("Table and output matrix", set("tie_embeddings"));

  const presets = data.shapes.map(({ name, state }) => {
    const button = element("button", { type: "button" }, name);
    button.addEventListener("click", () => change(state));
    return { button, state };
  });
  const numbers = SHOWN.map(([key, label, format]) => {
    const output = element("output", { "data-quantity": key, "aria-live": "off" });
    return { key, format, output, el: element("div", {}, element("dt", {}, label), element("dd", {}, output)) };
  });
  const parts = PARTS.map(([key, label]) => {
    const share = element("span");
    return { key, share, bar: element("div", { class: key }), el: element("span", { class: key }, label, " ", share) };
  });
  const rows = data.shapes.map(({ name, state }, i) => rulerRow(counts(state), name, i + 1, "known"));
  const chosen = element("g");
  const message = element("p", { class: "message" }); // near the controls; a screen reader hears it from the words below
  const picture = element(
    "div",
    { class: "picture", "aria-hidden": "true" },
    element(
      "div",
      { class: "parts" },
      element("div", { class: "title" }, "Where the parameters are"),
      element("div", { class: "bar" }, ...parts.map(({ bar }) => bar)),
      element("div", { class: "legend" }, ...parts.map((part) => part.el)),
      message,
    ),
    element("div", { class: "title" }, "Memory: weights at 4.5, 8, 16, 32 bits (dots), KV cache (diamond)"),
    element("svg", { width: "100%", height: TOP + ROW * (rows.length + 1) + 24 }, rulerGround(rows.length + 1, data.laptop), ...rows, chosen),
  );
  const words = element("p", { class: "words", "aria-live": "polite" });
  const say = atRest((text) => (words.textContent = text));

  function show() {
    const s = draft, wrong = problem(s), q = wrong ? null : counts(s);
    for (const { button, state } of presets) button.setAttribute("aria-pressed", same(state, s));
    for (const [control, name] of [[width, "dim"], [depth, "n_layers"], [heads, "n_heads"], [context, "context"], [trained, "tokens"], [vocabulary, "vocab_size"]]) {
      control.show(s[name]);
    }
    hidden.show(hiddenWidth(s));
    const sharing = s.block === "llama" ? divisors(s.n_heads) : [s.n_heads];
    if (!sharing.includes(s.n_kv_heads)) sharing.push(s.n_kv_heads); // so that the list shows what the message is about
    shared.show(s.n_kv_heads, sharing.map((g) => [g, g === s.n_heads ? `${g}, one each` : String(g)]));
    block.show(s.block, [["llama", "Llama: SwiGLU, rotary positions"], ["gpt3", "GPT-3: GELU, biases, learned positions"]]);
    tied.show(s.tie_embeddings, s.block === "llama" ? [[true, "one and the same"], [false, "two matrices"]] : [[true, "one and the same"]]);

    el.classList.toggle("impossible", wrong !== null);
    for (const { key, format, output } of numbers) {
      output.textContent = wrong ? "–" : format(q[key]);
      if (wrong) delete output.dataset.value;
      else output.dataset.value = q[key];
    }
    for (const { key, share, bar } of parts) {
      const part = wrong ? 0 : Number(q[key]) / Number(q.parameters);
      bar.style.width = `${100 * part}%`;
      share.textContent = wrong ? "–" : percent(part);
    }
    chosen.replaceChildren(...(wrong ? [] : [rulerRow(q, "this shape", 0, "chosen")]));
    message.textContent = wrong ?? "";
    say(wrong ?? describe(s, q, data));
  }

  frame(
    el,
    element("div", { class: "presets", role: "group", "aria-label": "Start from" }, ...presets.map(({ button }) => button)),
    element("div", { class: "fields" }, width.el, depth.el, heads.el, shared.el, context.el, trained.el),
    element("details", {}, element("summary", {}, "More of the shape"), element("div", { class: "fields" }, block.el, hidden.el, vocabulary.el, tied.el)),
    picture,
    element("dl", { class: "numbers" }, ...numbers.map((number) => number.el)),
    words,
  );
  const moved = () => {
    if (draft === model.get("state")) return;
    draft = model.get("state");
    show();
  };
  model.on("change:state", moved);
  show();
  words.textContent = problem(draft) ?? describe(draft, counts(draft), data);
  return () => {
    model.off("change:state", moved);
    say.cancel();
  };
}

export default { render };
