// What a model's shape costs: parameters, operations, KV cache and memory, beside GPT-3 and LLaMA.
// model_size.py has the same numbers from tinylm, and the shapes to compare with.
import { atRest, choice, element, frame, inBytes, inWords, percent, slider, wholeNumber } from "./kit.mjs";

// The sliders' steps.
const WIDTHS = [
  32, 48, 64, 96, 128, 192, 256, 384, 512, 576, 640, 768, 1024, 1280, 1536, 2048, 2560, 3072, 4096, 5120, 6144, 8192,
  10240, 12288, 16384,
];
const DEPTHS = [1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128];
const HEADS = [1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128];
const CONTEXTS = Array.from({ length: 13 }, (_, i) => 64 * 2 ** i);
const TOKENS = Array.from({ length: 23 }, (_, i) => [1, 2, 5][i % 3] * 10 ** (6 + Math.floor(i / 3)));

const BITS = [32, 16, 8, 4.5];
const SHOWN = [
  ["parameters", "Parameters", inWords],
  ["parameters_without_tables", "Parameters without the tables", inWords],
  ["train_flops_per_token", "Training FLOPs a token", inWords],
  ["train_flops", "Training FLOPs in all", inWords],
  ["decode_flops", "FLOPs to generate a token", inWords],
  ["kv_cache_bytes", "KV cache, 16 bits", inBytes],
  ...BITS.map((bits) => [`weight_bytes_${bits}`, `Weights, ${bits} bits`, inBytes]),
];
const PARTS = [
  { key: "tables", name: "tables", inText: "in the tables", color: "var(--orange)" },
  { key: "attention", name: "attention", inText: "in attention", color: "var(--blue)" },
  { key: "mlp", name: "MLP", inText: "in the MLP", color: "var(--green)" },
];

const comma = (n) => n.toLocaleString("en");
const plural = (n, noun) => `${comma(n)} ${noun}${n === 1 ? "" : "s"}`;
const divisors = (n) => Array.from({ length: n }, (_, i) => n - i).filter((d) => n % d === 0);
const same = (a, b) => Object.keys(a).every((key) => a[key] === b[key]);
const ratio = (a, b) => Number(a) / Number(b);

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
  const channels = s.dim / s.n_heads;
  if (!Number.isInteger(channels)) {
    return `A width of ${comma(s.dim)} does not divide evenly among ${s.n_heads} heads. Choose another width or number of heads.`;
  }
  if (s.block === "llama" && channels % 2) {
    return `Each head would have ${plural(channels, "channel")}, an odd number, but rotary embeddings turn pairs of channels. `
      + "Choose another width or number of heads.";
  }
  if (s.n_heads % s.n_kv_heads) {
    return `${s.n_heads} query heads cannot share ${s.n_kv_heads} key-value heads evenly. Choose one of the other numbers.`;
  }
  return null;
}

/** All numbers of the figure, as BigInt: GPT-3's training takes more operations than a double counts exactly. */
export function counts(s) {
  const [v, c, n, h] = [s.vocab_size, s.dim, s.n_layers, s.n_heads].map(BigInt);
  const [g, f, t, tokens] = [s.n_kv_heads, hiddenWidth(s), s.context, s.tokens].map(BigInt);
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
    train_flops: 3n * forward * tokens,
    decode_flops: forward,
    kv_cache_bytes: 2n * n * g * (c / h) * t * 2n,
  };
  for (const bits of BITS) out[`weight_bytes_${bits}`] = (parameters * BigInt(2 * bits) + 15n) / 16n; // rounded up
  return out;
}

// The ruler: ten decades from a kilobyte across its whole width, whatever that is.
const ROW = 25, TOP = 24;
const at = (bytes) => `${10 * Math.min(9.9, Math.max(0.1, Math.log10(Number(bytes)) - 3))}%`;

function rulerRow(q, name, row, kind) {
  const y = TOP + ROW * (row + 0.5);
  const weights = BITS.map((bits) => Number(q[`weight_bytes_${bits}`]));
  const cache = Number(q.kv_cache_bytes);
  const right = Math.max(cache, ...weights) < 1e9; // on which side of its marks the name stands
  const edge = right ? Math.max(cache, ...weights) : Math.min(cache, ...weights);
  const text = { x: at(edge), dx: right ? 10 : -10, y: y + 4, "text-anchor": right ? "start" : "end" };
  const diamond = element("path", { d: "M-5 0 0-5 5 0 0 5Z", class: "hollow" });
  return element(
    "g",
    { class: kind },
    element("line", { x1: at(Math.min(...weights)), x2: at(Math.max(...weights)), y1: y, y2: y }),
    ...weights.map((bytes) => element("circle", { cx: at(bytes), cy: y, r: 4 })),
    element("svg", { x: at(cache), y, overflow: "visible" }, diamond),
    element("text", text, name),
  );
}

function rulerGround(rows, laptop) {
  const bottom = TOP + ROW * rows;
  const ticks = [[1e3, "1 kB", "start"], [1e6, "1 MB", "middle"], [1e9, "1 GB", "middle"], [1e12, "1 TB", "middle"]];
  return element(
    "g",
    {},
    ...ticks.map(([bytes]) => element("line", { x1: at(bytes), x2: at(bytes), y1: TOP, y2: bottom })),
    ...ticks.map(([bytes, text, anchor]) => element("text", { x: at(bytes), y: bottom + 17, "text-anchor": anchor }, text)),
    element("line", { x1: at(laptop), x2: at(laptop), y1: 4, y2: bottom, class: "limit" }),
    element("text", { x: at(laptop), dx: -6, y: 15, "text-anchor": "end" }, `${inBytes(laptop)} laptop`),
  );
}

/** The picture and the numbers in words. */
function describe(s, q, { shapes, laptop }) {
  const known = shapes.map(({ name, state }) => ({ name, q: counts(state) }));
  const far = (one) => Math.abs(Math.log(ratio(q.parameters, one.q.parameters)));
  const nearest = known.reduce((best, one) => (far(one) < far(best) ? one : best));
  const size = ratio(q.parameters, nearest.q.parameters);
  const beside = far(nearest) < 0.005 ? "as many as" : size > 1 ? `${inWords(size)} times as many as` : `${percent(size)} of`;
  const shares = PARTS.map(({ key, inText }) => `${percent(ratio(q[key], q.parameters))} ${inText}`);

  const fitting = BITS.filter((bits) => Number(q[`weight_bytes_${bits}`]) <= laptop);
  const some = fitting.length ? `from ${fitting[0]} bits down` : "at none of the four precisions";
  const fits = fitting.length === BITS.length ? "at all four precisions" : some;

  const largest = known.at(-1);
  const times = ratio(largest.q.train_flops, q.train_flops);
  const more = `and ${largest.name} took ${inWords(times)} times as many`;
  const fewer = `${inWords(1 / times)} times as many as ${largest.name} took`;
  const training = Math.abs(times - 1) < 0.005 ? `as many as ${largest.name} took` : times > 1 ? more : fewer;

  return [
    `${plural(s.n_layers, "layer")} of ${comma(s.dim)} channels: ${inWords(q.parameters)} parameters, `,
    `${beside} ${nearest.name}; ${shares.join(", ")}. `,
    `The weights take ${inBytes(q["weight_bytes_4.5"])} at 4.5 bits and ${inBytes(q.weight_bytes_32)} at 32; `,
    `they fit a ${inBytes(laptop)} laptop ${fits}. `,
    `The KV cache of ${plural(s.context, "token")} takes ${inBytes(q.kv_cache_bytes)}. `,
    `Training on ${inWords(s.tokens)} tokens takes ${inWords(q.train_flops)} operations (FLOPs), ${training}.`,
  ].join("");
}

function render({ model, el }) {
  const data = model.get("data");
  let draft = model.get("state"); // what the controls say, possible or not; the model holds only what can be

  const change = (changes) => {
    const one = draft.n_kv_heads === draft.n_heads; // a key-value head for each query head stays so
    draft = { ...draft, ...changes };
    if (("dim" in changes || "block" in changes) && !("hidden_dim" in changes)) draft.hidden_dim = null;
    if (one && !("n_kv_heads" in changes)) draft.n_kv_heads = draft.n_heads;
    if (draft.block === "gpt3") Object.assign(draft, { n_kv_heads: draft.n_heads, tie_embeddings: true });
    show();
    if (problem(draft) === null) {
      model.set("state", draft);
      model.save_changes();
    }
  };
  const to = (name) => (value) => change({ [name]: value });

  const sliders = {
    dim: slider("Width", WIDTHS, (n) => plural(n, "channel"), to("dim")),
    n_layers: slider("Depth", DEPTHS, (n) => plural(n, "layer"), to("n_layers")),
    n_heads: slider("Query heads", HEADS, (n) => plural(n, "head"), to("n_heads")),
    context: slider("Context", CONTEXTS, (n) => plural(n, "token"), to("context")),
    tokens: slider("Training tokens", TOKENS, inWords, to("tokens")),
  };
  const shared = choice("Key-value heads", to("n_kv_heads"));
  const block = choice("Block", to("block"));
  const hidden = wholeNumber("MLP width", to("hidden_dim"));
  const vocabulary = wholeNumber("Vocabulary", to("vocab_size"));
  const output = choice("Output matrix", to("tie_embeddings"));

  const presets = data.shapes.map(({ name, state }) => {
    const button = element("button", { type: "button" }, name);
    button.addEventListener("click", () => change(state));
    return { button, state };
  });
  const numbers = SHOWN.map(([key, label, format]) => {
    const place = element("output", { "data-quantity": key, "aria-live": "off" }); // the words below speak, once
    return { key, format, place, el: element("div", {}, element("dt", {}, label), element("dd", {}, place)) };
  });
  const parts = PARTS.map(({ key, name, color }) => {
    const share = element("span");
    const style = `--part: ${color}`;
    return { key, share, bar: element("div", { style }), el: element("span", { style }, name, " ", share) };
  });
  const rows = data.shapes.map(({ name, state }, i) => rulerRow(counts(state), name, i + 1, "known"));
  const chosen = element("g");
  const message = element("p", { class: "message" }); // near the controls; a screen reader hears it from the words
  const words = element("p", { class: "words", "aria-live": "polite" });
  const say = atRest((text) => (words.textContent = text));

  function show() {
    const s = draft, wrong = problem(s), q = wrong ? null : counts(s);
    for (const { button, state } of presets) button.setAttribute("aria-pressed", same(state, s));
    for (const [name, control] of Object.entries(sliders)) control.show(s[name]);
    hidden.show(hiddenWidth(s));
    vocabulary.show(s.vocab_size);
    const llama = s.block === "llama", sharing = llama ? divisors(s.n_heads) : [s.n_heads];
    if (!sharing.includes(s.n_kv_heads)) sharing.push(s.n_kv_heads); // so that the list shows what the message is about
    shared.show(s.n_kv_heads, sharing.map((g) => [g, g === s.n_heads ? `${g}, one each` : String(g)]));
    block.show(s.block, [["llama", "Llama (SwiGLU)"], ["gpt3", "GPT-3 (GELU)"]]);
    output.show(s.tie_embeddings, [[true, "the table (tied)"], ...(llama ? [[false, "one of its own"]] : [])]);

    el.classList.toggle("impossible", wrong !== null);
    message.textContent = wrong ?? "";
    for (const { key, format, place } of numbers) {
      place.textContent = wrong ? "–" : format(q[key]);
      if (wrong) delete place.dataset.value;
      else place.dataset.value = q[key];
    }
    for (const { key, share, bar } of parts) {
      bar.style.width = wrong ? 0 : `${100 * ratio(q[key], q.parameters)}%`;
      share.textContent = wrong ? "–" : percent(ratio(q[key], q.parameters));
    }
    chosen.replaceChildren(...(wrong ? [] : [rulerRow(q, "this shape", 0, "chosen")]));
    const text = wrong ?? describe(s, q, data);
    words.textContent ? say(text) : (words.textContent = text);
  }

  const title = (text) => element("div", { class: "title" }, text);
  const height = TOP + ROW * (rows.length + 1) + 24;
  const { dim, n_layers, n_heads, context, tokens } = sliders;
  const more = [block, hidden, vocabulary, output].map((control) => control.el);
  frame(
    el,
    element("div", { class: "presets", role: "group", "aria-label": "Start from" }, ...presets.map(({ button }) => button)),
    element("div", { class: "fields" }, dim.el, n_layers.el, n_heads.el, shared.el, context.el, tokens.el),
    element("details", {}, element("summary", {}, "More of the shape"), element("div", { class: "fields" }, ...more)),
    element(
      "div",
      { class: "picture", "aria-hidden": "true" },
      element(
        "div",
        { class: "covered" },
        title("Where the parameters are"),
        element("div", { class: "bar" }, ...parts.map(({ bar }) => bar)),
        element("div", { class: "legend" }, ...parts.map((part) => part.el)),
        message,
      ),
      title("Memory: weights at 4.5, 8, 16, 32 bits (dots), KV cache (diamond)"),
      element("svg", { width: "100%", height }, rulerGround(rows.length + 1, data.laptop), ...rows, chosen),
    ),
    element("dl", { class: "numbers" }, ...numbers.map((number) => number.el)),
    words,
  );
  show();
  const moved = () => {
    if (draft === model.get("state")) return;
    draft = model.get("state");
    show();
  };
  model.on("change:state", moved);
  return () => {
    model.off("change:state", moved);
    say.cancel();
  };
}

export default { render };
