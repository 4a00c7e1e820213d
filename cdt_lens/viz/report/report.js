"use strict";
// Draws the figures and the views of a page, and links them. It reads numbers from the inert data
// and writes text only as text.
(function () {
  const data = JSON.parse(document.getElementById("cdt-data").textContent);
  const specs = data.figures || {};
  const drawn = {}; // the Vega view of each figure, by the id of its element
  const signals = {}; // what was set on a figure, so that it survives being drawn again
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const byId = (id) => document.getElementById(id);
  const make = (tag, text) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const signed = (x) => (x === null ? "n/a" : (x < 0 ? "" : "+") + x.toFixed(4));
  const fixed = (x) => (x === null ? "n/a" : x.toFixed(3));
  const range = (low, high, read) =>
    low === null || high === null ? "" : " [" + read(low) + ", " + read(high) + "]";

  // Figures ----------------------------------------------------------------------------------------

  const night = {
    "#ffffff": "#171c23", "#f7f7f7": "#2b323c", "#1a1a1a": "#e6e9ed", "#666666": "#a3adb8",
    "#dddddd": "#3a434e", "#d4d4d4": "#4a525c", "#ececec": "#2b323c", "#d9d9d9": "#4a525c",
    "#efefef": "#343c46", "#2166ac": "#74b4f2", "#b2182b": "#f2806f", "#c25100": "#ffb15c",
    "#a9c6e3": "#3d6a94", "#8a5a00": "#d8a344", "#3f7a52": "#7ec696", "#7a4988": "#c79ad4",
    "#12808f": "#5fc4d1", "#a03b6d": "#e288b2", "#5b7083": "#9db2c6", "#6b8e23": "#a9cc62",
    "#444444": "#c3c8ce", "#3d5a98": "#8ea9e6", "#c2571a": "#f0965f", "#d9822b": "#f0a75c",
    white: "#171c23",
  };

  // A label or a title may be named like a colour: what is read stays.
  function themed(value) {
    const read = (key, part) => key === "values" || key === "domain"
      || (["text", "title", "subtitle"].includes(key) && [part].flat().every((line) => typeof line === "string"));
    if (typeof value === "string") return dark.matches ? night[value] || value : value;
    if (Array.isArray(value)) return value.map(themed);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(
      Object.entries(value).map(([key, part]) => [key, read(key, part) ? part : themed(part)]));
  }

  function wrapped(lines, width) {
    const most = Math.floor(width / 8);
    return [].concat(lines).flatMap((line) => line.match(new RegExp("\\S.{0," + (most - 1) + "}(?=\\s|$)|\\S+", "gu")) || []);
  }

  // Narrow windows get narrow panels, or panels below each other: text keeps its size and wraps.
  function fitted(spec, width) {
    if (width < 560 && spec.config) {
      const { title, config } = spec;
      const text = Array.isArray(title.text) ? wrapped(title.text, width) : title.text;
      const legend = { ...config.legend, labelLimit: width - 60, columns: 1 };
      spec = { ...spec, title: { ...title, text, subtitle: wrapped(title.subtitle, width) }, config: { ...config, legend } };
    }
    const room = Math.max(width - 120, 180);
    if (spec.layer && typeof spec.width === "number" && !spec.usermeta)
      return { ...spec, width: Math.min(spec.width, room) };
    if (spec.facet && spec.spec)
      return { ...spec, columns: Math.max(1, Math.min(spec.columns, Math.floor(width / (spec.spec.width + 45)))) };
    if (spec.vconcat)
      return { ...spec, vconcat: spec.vconcat.flatMap((part) =>
        part.hconcat && width < 860 ? part.hconcat.map((each) => fitted(each, width)) : [fitted(part, width)]) };
    return spec;
  }

  async function draw(id) {
    const element = byId(id);
    const room = element.closest(".panel") || element.closest("section");
    const spec = themed(fitted(specs[id], room.clientWidth - 70));
    const old = drawn[id];
    const result = await vegaEmbed(element, spec, { mode: "vega-lite", actions: false, ast: true, renderer: "svg", logLevel: 1, tooltip: { theme: dark.matches ? "dark" : "light" } });
    if (old) old.finalize();
    drawn[id] = result.view;
    for (const [name, value] of Object.entries(signals[id] || {})) result.view.signal(name, value);
    await result.view.runAsync();
    element.dispatchEvent(new CustomEvent("drawn"));
  }

  function set(id, name, value) {
    (signals[id] = signals[id] || {})[name] = value;
    if (drawn[id]) drawn[id].signal(name, value).runAsync();
  }

  // Views of prompts -------------------------------------------------------------------------------

  function mount(view) {
    if (view.mounted) return;
    view.mounted = true;
    CircuitsVis.render(view.id, CircuitsVis[view.component], view.props);
    if (view.component === "AttentionHeads") nameHeads(view, 100);
  }

  // circuitsvis draws the small patterns for the mouse alone: give each a name and the keyboard.
  function nameHeads(view, tries) {
    const names = view.props.attentionHeadNames;
    const box = byId(view.id);
    const boxes = [...box.querySelectorAll("canvas")].slice(0, names.length).map((c) => {
      let part = c;
      while (part.parentElement && part.parentElement.querySelectorAll("canvas").length === 1) part = part.parentElement;
      return part;
    });
    if (boxes.length < names.length) {
      if (tries) setTimeout(() => nameHeads(view, tries - 1), 50);
      return;
    }
    view.boxes = boxes;
    box.querySelectorAll("canvas").forEach((canvas, place) => {
      canvas.setAttribute("aria-label", place < names.length ? "pattern of " + names[place] : "enlarged pattern");
    });
    boxes.forEach((part, place) => {
      part.tabIndex = 0;
      part.setAttribute("role", "button");
      part.setAttribute("aria-label", "enlarge the pattern of " + names[place]);
      const press = part.querySelector("canvas").parentElement;
      part.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        choose(press);
      });
    });
  }

  function choose(element) {
    element.dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
    element.click();
  }

  // The linked map, curve and prompts --------------------------------------------------------------

  const explore = data.explore;

  function startExplorer() {
    const index = Object.fromEntries(explore.heads.map((head, place) => [head.name, place]));
    const [layers, across] = explore.shape;
    const chooser = byId("explore-head");
    const map = byId("explore-map");
    let pinned = false;

    const order = explore.heads.map((head) => head.name);
    order.sort((a, b) => (explore.heads[index[b]].score ?? -Infinity) - (explore.heads[index[a]].score ?? -Infinity));
    for (const name of order) chooser.append(make("option", name));

    function point(name) {
      if (!(name in index)) return;
      chooser.value = name;
      set("explore-map", "pointed", name);
      tell(explore.heads[index[name]], index[name]);
    }

    function tell(head, place) {
      const facts = byId("explore-facts");
      facts.replaceChildren();
      const fact = (name, text) => {
        const row = make("div");
        row.append(make("dt", name), make("dd", text));
        facts.append(row);
      };
      byId("explore-name").textContent = head.name;
      fact("Score (logits)", head.score === null ? "not scored" : signed(head.score) + range(head.low, head.high, signed));
      fact("Standard error", head.stderr === null ? "n/a" : head.stderr.toFixed(4));
      fact("In the circuit", explore.circuit.includes(head.name) ? "yes" : "no");
      for (const rank of explore.ranks)
        fact("Rank by " + rank.method, rank.places[place] === null ? "not scored" : rank.places[place] + " of " + rank.of);
      tellEffects(head.name);
      list("explore-in", explore.edges.filter((e) => e.to === head.name), (e) => e.from + (e.site ? " (read by " + e.site + ")" : "") + ": " + (e.score === null ? "not scored" : signed(e.score) + " " + e.unit));
      list("explore-out", explore.edges.filter((e) => e.from === head.name), (e) => e.to + (e.site ? " (read by " + e.site + ")" : "") + ": " + (e.score === null ? "not scored" : signed(e.score) + " " + e.unit));
      const reads = explore.reads.filter((prompt) => head.name in prompt.heads);
      list("explore-reads", reads, (prompt) => "Prompt " + (prompt.prompt + 1) + " (" + prompt.label + "): " +
        prompt.heads[head.name].map(([, token, weight]) => "\u2068\u201c" + token.replace(/\n/g, "\u21b5") + "\u201d\u2069 " + fixed(weight)).join(", "));
      for (const view of data.views || []) {
        const place = (view.props.attentionHeadNames || []).indexOf(head.name);
        if (place >= 0 && view.boxes) choose(view.boxes[place].querySelector("canvas").parentElement);
      }
    }

    function tellEffects(name) {
      const view = drawn["explore-effects"];
      const effects = explore.effects[name];
      const note = byId("explore-effects-note");
      if (!note) return;
      note.textContent = effects ? effects.length + " prompts" : "The page holds no effects on single prompts of this head.";
      if (!view) return;
      const rows = (effects || []).map((effect, i) => ({ effect, label: explore.labels[i], prompt: i + 1, lane: ((i * 5) % 7) - 3 }));
      view.data("effects", rows).resize().runAsync();
    }

    function list(id, items, read) {
      const element = byId(id);
      element.replaceChildren(...items.map((item) => make("li", read(item))));
      element.parentElement.hidden = !items.length;
    }

    chooser.addEventListener("change", () => { pinned = true; point(chooser.value); });
    map.addEventListener("keydown", (event) => {
      const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
      const step = steps[event.key];
      if (!step) return;
      event.preventDefault();
      const place = index[chooser.value];
      const layer = Math.min(Math.max(Math.floor(place / across) + step[0], 0), layers - 1);
      const head = Math.min(Math.max((place % across) + step[1], 0), across - 1);
      pinned = true;
      point(explore.heads[layer * across + head].name);
    });
    map.addEventListener("drawn", () => {
      const at = (item) => item && typeof item.datum === "object" && "head" in item.datum && "L" + item.datum.layer + "H" + item.datum.head;
      drawn["explore-map"].addEventListener("pointerover", (event, item) => { if (!pinned && at(item)) point(at(item)); });
      drawn["explore-map"].addEventListener("click", (event, item) => {
        if (!at(item)) return;
        pinned = !(pinned && chooser.value === at(item));
        point(at(item));
      });
    });
    const strip = byId("explore-effects");
    if (strip) strip.addEventListener("drawn", () => tellEffects(chooser.value));
    if (explore.sizes.length) startSizes();
    point(order[0]);
  }

  function startSizes() {
    const slider = byId("explore-size");
    const told = byId("explore-told");
    const own = explore.sizes.findIndex((size) => size.heads === explore.own);
    slider.max = explore.sizes.length - 1;
    slider.value = Math.max(own, 0);
    function keep() {
      const size = explore.sizes[slider.value];
      set("explore-map", "kept", size.heads);
      set("explore-curve", "kept", size.heads);
      const random = size.random.map((r) => r.name + " " + fixed(r.median) + " (" + Math.round(100 * r.beaten) + " % beaten)");
      const words = size.heads + " heads (" + +(100 * size.share).toPrecision(3) + " %): f = " + fixed(size.f) + range(size.low, size.high, fixed);
      told.textContent = words + "; without them " + fixed(size.without) + (random.length ? "; " + random.join(", ") : "");
      slider.setAttribute("aria-valuetext", words);
    }
    slider.addEventListener("input", keep);
    if (own >= 0) keep();
    else told.textContent = "The circuit itself is outlined. Move the size to outline the first heads of the ranking.";
  }

  // The measures of a transfer ---------------------------------------------------------------------

  function startMeasures(box) {
    const id = box.dataset.figure;
    const apply = () => {
      set(id, "measure", box.querySelector("select").value);
      set(id, "seeds", box.querySelector("input[name=seeds]").checked);
      const scopes = [...box.querySelectorAll("input[name=scope]")];
      set(id, "hidden", scopes.filter((s) => !s.checked).map((s) => Number(s.value)));
    };
    box.addEventListener("change", apply);
    box.hidden = false;
    apply();
  }

  // The test rows whose answer changed: choose a language and a verdict.
  function startFilter(box) {
    const rows = [...box.parentElement.querySelectorAll("tbody tr")];
    const note = box.querySelector("output");
    const apply = () => {
      const [first, last] = [...box.querySelectorAll("select")].map((s) => s.value);
      let count = 0;
      for (const row of rows) {
        const cells = [...row.children].map((cell) => cell.textContent);
        row.hidden = (first && cells[0] !== first) || (last && cells.at(-1) !== last) ? true : false;
        count += row.hidden ? 0 : 1;
      }
      note.textContent = count + " of " + rows.length + " rows";
    };
    box.addEventListener("change", apply);
    box.hidden = false;
    apply();
  }

  // Start ------------------------------------------------------------------------------------------

  const jobs = [
    ...(data.views || []).map((view) => ({ id: view.id, run: () => mount(view) })),
    ...Object.keys(specs).map((id) => ({ id, run: () => draw(id) })),
  ];
  const waiting = new Map(jobs.map((job) => [job.id, job]));
  const start = (id) => {
    const job = waiting.get(id);
    waiting.delete(id);
    return job && job.run();
  };
  const startAll = () => [...waiting.keys()].forEach(start);

  document.querySelectorAll("[data-script]").forEach((element) => { element.hidden = false; });
  if (explore) startExplorer();
  document.querySelectorAll(".measures").forEach(startMeasures);
  document.querySelectorAll(".filter").forEach(startFilter);
  window.addEventListener("beforeprint", () => {
    document.querySelectorAll("details").forEach((box) => { box.open = true; });
    startAll();
  });
  dark.addEventListener("change", () => Object.keys(drawn).forEach(draw));
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (Math.abs(window.innerWidth - width) < 40) return;
    width = window.innerWidth;
    Object.keys(drawn).forEach(draw);
  });
  if (!("IntersectionObserver" in window)) return startAll();
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      seen.unobserve(entry.target);
      start(entry.target.id);
    }
  }, { rootMargin: "400px" });
  jobs.forEach((job) => seen.observe(byId(job.id)));
})();
