// Puts the page together: header, filters, views, keys, and the address that keeps the view.
"use strict";

(() => {
  const MOST_WORDS = 400;
  const SHOWN_WORDS = 12;
  const GROUPS = ["Picks", "Job", "Matrix", "Metadata", "Settings", "Figures", "Model and machine"];
  const OPEN_AT_FIRST = ["pick", "run", "status", "task", "verdict", "finish_reason", "tags"];
  const VIEWS = { images: "Images", axes: "Axes", report: "Report" };

  const state = { view: "images", side: innerWidth < 600 ? 110 : 170 };
  const nodes = {};
  let query, grid, axes, report, single, compare, openFacets, expanded = new Set();
  let applying = false;

  document.addEventListener("DOMContentLoaded", async () => {
    try {
      await start();
    } catch (error) {
      SB.put(document.getElementById("main"), SB.el("p", { class: "notice" }, `This gallery cannot be shown. ${error.message}`));
      throw error;
    }
  });

  async function start() {
    const index = (SB.index = SB.given("index"));
    if (!index) throw new Error("Its file data/index.js is missing or damaged: make it again with sensebatch gallery.");
    SB.items = SB.makeItems(index, await SB.load("items", { keep: false }));
    SB.picks = new SB.Picks();
    SB.picks.makeColumns();
    document.title = `${index.title} - sensebatch gallery`;
    query = new SB.Query();
    grid = new SB.Grid({ onopen: (place) => openItem(grid.result[place]), onselect: drawSelection });
    grid.onclear = clearAll;
    axes = new SB.Axes({ onchange: () => apply(), onopen: openItem, onfilter: filterCell });
    report = new SB.Report({ onfilter: (name, word) => { clearFilters(); query.facets.set(name, new Set([word])); state.view = "images"; apply(); } });
    single = new SB.Single({
      result: () => (state.view === "axes" ? query.result : grid.result),
      onmove: (place, number) => { if (place >= 0 && state.view === "images") { grid.active = place; grid.scrollTo(place); } state.number = number; writeAddress(); },
      onclose: () => {
        state.number = undefined;
        refreshPicks();
        writeAddress();
        const place = single.place();
        if (state.view === "images" && place >= 0) grid.focus(place);
      },
    });
    compare = new SB.Compare({ onclose: () => { refreshPicks(); writeAddress(); } });
    SB.picks.listeners.push(() => { pickChanged(); });
    openFacets = new Set(OPEN_AT_FIRST);
    makeHeader();
    document.addEventListener("keydown", key);
    addEventListener("hashchange", () => { if (location.hash.slice(1) !== state.address) readAddress(); });
    addEventListener("popstate", () => { if (location.hash.slice(1) !== state.address) readAddress(); });
    readAddress();
    document.documentElement.dataset.ready = "true";
    await SB.loadPrompts(SB.items, (number) => {
      if (number === 0 || SB.items.prompts.complete) grid.refresh();
      if (!SB.items.prompts.complete) return;
      single.refresh();
      compare.refresh();
      query.forget(["prompt"]);
      if (query.search || query.sort === "prompt" || state.view === "axes") apply();
      document.documentElement.dataset.complete = "true";
    });
  }

  // Returns what an item is called: by its run too where there are several.
  SB.nameOf = (item) => (SB.index.runs.length > 1 ? [SB.el("span", { class: "dim" }, `${SB.index.runs[SB.items.run[item]].name} `), SB.items.ids[item]] : SB.items.ids[item]);

  SB.columnGroups = () => GROUPS.map((group) => [group, SB.items.columns.filter((column) => column.group === group)]).filter(([, columns]) => columns.length);

  // --- header -------------------------------------------------------------------------------

  function makeHeader() {
    const index = SB.index;
    nodes.search = SB.el("input", { type: "search", id: "search", placeholder: "Search prompts, ids, tags; seed:7 num_steps>20 -word “a phrase”", "aria-label": "Search", autocomplete: "off", spellcheck: "false" });
    let pausing;
    nodes.search.addEventListener("input", () => {
      clearTimeout(pausing);
      pausing = setTimeout(() => { query.search = nodes.search.value; apply(); }, 80);
    });
    nodes.search.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || (event.key === "ArrowDown" && state.view === "images")) { event.preventDefault(); grid.focus(grid.active); }
      if (event.key === "Escape" && nodes.search.value) { event.preventDefault(); nodes.search.value = query.search = ""; apply(); }
    });
    nodes.tabs = SB.el("div", { class: "tabs", role: "group", "aria-label": "Views" }, Object.entries(VIEWS).map(([view, words]) => SB.button(words, () => { state.view = view; apply({ push: true }); }, { value: view })));
    nodes.sort = SB.select("Sort by", sortOptions(), query.sort, (value) => { query.sort = value; apply(); }, { id: "sort" });
    nodes.direction = SB.button("↑", () => { query.descending = !query.descending; apply(); }, { id: "direction" });
    nodes.size = SB.el("input", { type: "range", id: "size", min: 72, max: 512, step: 2, value: state.side, "aria-label": "Size of the images", title: "Size of the images" });
    nodes.size.addEventListener("input", () => { state.side = Number(nodes.size.value); sized(); });
    nodes.count = SB.el("span", { class: "count", role: "status", "aria-live": "polite", id: "count" });
    nodes.filters = SB.button("Filters", () => toggleFilters(), { id: "filters", "aria-controls": "facets" });
    nodes.picks = SB.el("details", { class: "menu", id: "picks" });
    const theme = SB.button("◐", changeTheme, { id: "theme", title: "Light, dark, or as the system has it", "aria-label": "Light or dark" });
    SB.put(
      document.getElementById("header"),
      SB.el("div", { class: "row" },
        SB.el("h1", { title: index.title }, index.title), nodes.tabs, nodes.search, nodes.picks,
        SB.el("span", { class: "buttons" }, theme, SB.button("?", () => SB.showHelp(), { id: "help", title: "Keys and search (?)", "aria-label": "Help" }))),
      SB.el("div", { class: "row second" },
        nodes.filters, nodes.count,
        nodes.chips = SB.el("span", { class: "chips" }),
        SB.el("span", { class: "tools" }, nodes.sorting = SB.el("span", { class: "sorting" }, SB.el("label", { for: "sort" }, "Sort"), nodes.sort, nodes.direction),
          nodes.sizing = SB.el("span", { class: "sizing" }, SB.el("label", { for: "size" }, "Size"), nodes.size))),
    );
    addEventListener("click", (event) => { if (nodes.picks.open && !nodes.picks.contains(event.target)) nodes.picks.open = false; });
    document.getElementById("skip").addEventListener("click", (event) => { event.preventDefault(); if (state.view === "images") grid.focus(grid.active); else document.getElementById("main").focus(); });
    try { document.documentElement.dataset.theme = localStorage.getItem("sensebatch-theme") ?? ""; } catch { /* nothing is kept */ }
    if (innerWidth < 900) document.body.classList.add("no-facets");
    drawPicksMenu();
  }

  function sortOptions() {
    const groups = SB.columnGroups().map(([label, columns]) => ({ label, options: columns.map((column) => [column.name, column.title]) }));
    return [["", "as in the manifest"], ["id", "id"], ["prompt", "prompt"], ...groups];
  }

  function changeTheme() {
    const themes = ["", "light", "dark"];
    const root = document.documentElement.dataset;
    root.theme = themes[(themes.indexOf(root.theme ?? "") + 1) % 3];
    try { localStorage.setItem("sensebatch-theme", root.theme); } catch { /* nothing is kept */ }
    SB.say({ "": "Light or dark as the system has it", light: "Light", dark: "Dark" }[root.theme]);
  }

  function toggleFilters(shown = document.body.classList.contains("no-facets")) {
    document.body.classList.toggle("no-facets", !shown);
    nodes.filters.setAttribute("aria-expanded", shown);
  }

  function drawPicksMenu() {
    const { keep, reject, tagged } = SB.picks.count();
    const isOpen = nodes.picks.open;
    const file = SB.el("input", { type: "file", accept: ".json,application/json", hidden: true, onchange: () => { if (file.files[0]) SB.picks.open(file.files[0]); } });
    const some = keep + reject + tagged > 0;
    SB.put(nodes.picks,
      SB.el("summary", null, "Picks", some ? SB.el("span", { class: "pill" }, `${SB.count(keep)} ✓ ${SB.count(reject)} ✗`) : null),
      SB.el("div", { class: "menu-body" },
        SB.el("p", null, some ? `${SB.count(keep)} kept, ${SB.count(reject)} rejected, ${SB.count(tagged)} tagged. They are kept in this browser.` : "Keep, reject and tag images with the keys k, r and t, or with the buttons of an image. Picks are kept in this browser."),
        SB.el("div", { class: "buttons column" },
          SB.button("Save as a file…", () => SB.picks.save(), { id: "save-picks", disabled: !some }),
          SB.button("Open a file…", () => file.click(), { id: "open-picks" }),
          SB.button("Forget all", () => { if (confirm("Forget all picks of this gallery?")) SB.picks.set(everyPicked(), { verdict: null }); }, { disabled: !some })),
        file,
        SB.el("p", { class: "dim" }, "sensebatch jobs, export and run --retry-from read the file.")));
    nodes.picks.open = isOpen;
  }

  function everyPicked() {
    const found = [];
    for (let item = 0; item < SB.items.count; item += 1) if (Object.keys(SB.picks.of(item)).length) { found.push(item); SB.picks.all.delete(SB.items.key(item)); }
    return found;
  }

  // --- filters ------------------------------------------------------------------------------

  function facetColumns() {
    nodes.facetColumns ??= SB.items.columns.filter((column) => column.group === "Picks" || (column.varies && (column.kind === "number" || column.words.length <= MOST_WORDS)));
    return nodes.facetColumns;
  }

  function isWordy(column) {
    return column.kind !== "number";
  }

  function countedColumns() {
    return facetColumns().filter((column) => isWordy(column) && (openFacets.has(column.name) || query.facets.has(column.name)));
  }

  function drawFacets() {
    const aside = document.getElementById("facets");
    const scrolled = aside.scrollTop;
    const focused = aside.contains(document.activeElement) ? document.activeElement.dataset.focus : undefined;
    const columns = facetColumns();
    const groups = GROUPS.map((group) => [group, columns.filter((column) => column.group === group)]).filter(([, found]) => found.length);
    SB.put(aside,
      SB.el("div", { class: "facets-head" }, SB.el("h2", null, "Filters"), SB.button("Clear", clearAll, { disabled: !query.facets.size && !query.search, "data-focus": "clear" }), SB.button("×", () => toggleFilters(false), { class: "only-narrow", "aria-label": "Close the filters" })),
      groups.map(([group, found]) => SB.el("section", null, SB.el("h3", null, group), found.map(facet))));
    aside.scrollTop = scrolled;
    if (focused) [...aside.querySelectorAll("[data-focus]")].find((node) => node.dataset.focus === focused)?.focus({ preventScroll: true });
  }

  function facet(column) {
    const isOpen = openFacets.has(column.name) || query.facets.has(column.name);
    const summary = SB.el("summary", { "data-focus": `facet ${column.name}` }, column.title, query.facets.has(column.name) ? SB.el("span", { class: "pill" }, "set") : null);
    const node = SB.el("details", { class: "facet", open: isOpen, "data-column": column.name }, summary, isOpen ? facetBody(column) : null);
    summary.addEventListener("click", (event) => {
      event.preventDefault();
      if (openFacets.has(column.name)) openFacets.delete(column.name);
      else openFacets.add(column.name);
      if (isOpen && query.facets.has(column.name)) return;
      apply({ keepPlace: true });
    });
    return node;
  }

  function facetBody(column) {
    if (!isWordy(column)) return rangeFacet(column);
    const counts = query.counts.get(column.name);
    const chosen = query.facets.get(column.name) ?? new Set();
    const words = [...counts].filter(([word, count]) => count > 0 || chosen.has(word) || (word !== SB.NONE && SB.items.columns.length && counts.size <= SHOWN_WORDS));
    const isFew = words.length <= SHOWN_WORDS || expanded.has(column.name);
    words.sort(column.group === "Picks" ? () => 0 : ([a, one], [b, other]) => (a === SB.NONE) - (b === SB.NONE) || (column.group === "Matrix" || column.group === "Settings" ? SB.collator.compare(a, b) : other - one || SB.collator.compare(a, b)));
    const shown = isFew ? words : words.slice(0, SHOWN_WORDS);
    for (const pair of words) if (chosen.has(pair[0]) && !shown.includes(pair)) shown.push(pair);
    return SB.el("div", { class: "words" },
      shown.map(([word, count]) => {
        const box = SB.el("input", { type: "checkbox", checked: chosen.has(word), "data-focus": `word ${column.name} ${word}`, onchange: () => choose(column, word, box.checked) });
        return SB.el("label", { class: count ? "" : "zero" }, box, SB.el("span", { class: "word" }, word === SB.NONE ? "none" : word), SB.el("span", { class: "number" }, SB.count(count)));
      }),
      isFew && words.length <= SHOWN_WORDS ? null : SB.button(isFew ? "Fewer" : `All ${SB.count(words.length)}`, () => { if (isFew) expanded.delete(column.name); else expanded.add(column.name); drawFacets(); }, { class: "link", "data-focus": `all ${column.name}` }));
  }

  function rangeFacet(column) {
    const few = column.distinct(SHOWN_WORDS + 1);
    const { from, to } = query.facets.get(column.name) ?? {};
    const set = (range) => {
      if (Number.isFinite(range.from) || Number.isFinite(range.to)) query.facets.set(column.name, { from: Number.isFinite(range.from) ? range.from : -Infinity, to: Number.isFinite(range.to) ? range.to : Infinity });
      else query.facets.delete(column.name);
      apply();
    };
    if (few.length <= SHOWN_WORDS && column.unit !== "time") {
      return SB.el("div", { class: "words values" }, few.map((value) => {
        const isSet = from === value && to === value;
        return SB.button(column.unit === "bytes" ? SB.figure(value, "bytes") : SB.figure(value), () => set(isSet ? {} : { from: value, to: value }), { class: "chip", "aria-pressed": isSet, "data-focus": `value ${column.name} ${value}` });
      }));
    }
    const limits = (column.limits ??= column.numbers.reduce(([low, high], value) => (Number.isNaN(value) ? [low, high] : [Math.min(low, value), Math.max(high, value)]), [Infinity, -Infinity]));
    const { type, write, read, words } = RANGES[column.unit] ?? { ...RANGES.plain, words: column.unit };
    const field = (name, value, limit, change) => SB.el("input", {
      type, step: "any", value: Number.isFinite(value) ? write(value) : "", placeholder: write(limit), "aria-label": `${column.title}, ${name}`, "data-focus": `${name} ${column.name}`,
      onchange: (event) => change(event.target.value === "" ? NaN : read(event.target.value)),
    });
    return SB.el("div", { class: `range ${type}` },
      field("at least", from, limits[0], (value) => set({ from: value, to })), SB.el("span", null, "to"),
      field("at most", to, limits[1], (value) => set({ from, to: value })),
      words ? SB.el("span", { class: "dim" }, words) : null);
  }

  // How the ends of a range are written: figures as they are, bytes in GiB, times as a calendar has them.
  const RANGES = {
    plain: { type: "number", write: (value) => String(Number(value.toPrecision(4))), read: Number, words: "" },
    bytes: { type: "number", write: (value) => String(Number((value / 2 ** 30).toPrecision(4))), read: (text) => Number(text) * 2 ** 30, words: "GiB" },
    time: { type: "datetime-local", write: (value) => new Date(value * 1000).toISOString().slice(0, 19), read: (text) => Date.parse(`${text}Z`) / 1000, words: "UTC" },
  };

  function choose(column, word, isChosen) {
    const chosen = new Set(query.facets.get(column.name) ?? []);
    if (isChosen) chosen.add(word);
    else chosen.delete(word);
    if (chosen.size) query.facets.set(column.name, chosen);
    else query.facets.delete(column.name);
    apply();
  }

  function clearFilters() {
    query.facets.clear();
    query.search = nodes.search.value = "";
  }

  function clearAll() {
    clearFilters();
    apply();
  }

  function filterCell(pairs) {
    for (const [field, value] of pairs) {
      if (!field) continue;
      if (field.name === "prompt") { query.search = nodes.search.value = field.whole(value).split('"').filter((part) => part.trim()).map((part) => `"${part}"`).join(" "); continue; }
      if (field.column.kind === "number") { if (!Number.isNaN(value)) query.facets.set(field.name, { from: value, to: value }); } else query.facets.set(field.name, new Set([value < 0 ? SB.NONE : field.column.words[value]]));
    }
    state.view = "images";
    apply({ push: true });
  }

  function drawChips() {
    const chips = [];
    for (const [name, wanted] of query.facets) {
      const column = SB.items.byName.get(name);
      const words = wanted instanceof Set ? [...wanted].map((word) => (word === SB.NONE ? "none" : word)).join(" or ") : rangeWords(wanted, column);
      chips.push(SB.button(`${column.title}: ${words} ×`, () => { query.facets.delete(name); apply(); }, { class: "chip", title: "Remove this filter" }));
    }
    SB.put(nodes.chips, chips);
  }

  function rangeWords({ from, to }, column) {
    if (from === to) return SB.figure(from, column.unit);
    if (!Number.isFinite(from)) return `≤ ${SB.figure(to, column.unit)}`;
    return Number.isFinite(to) ? `${SB.figure(from, column.unit)} to ${SB.figure(to, column.unit)}` : `≥ ${SB.figure(from, column.unit)}`;
  }

  // --- views --------------------------------------------------------------------------------

  // Finds the items and shows them.
  function apply({ push = false, keepPlace = false } = {}) {
    const began = performance.now();
    const result = query.run(countedColumns());
    drawFacets();
    drawChips();
    const main = document.getElementById("main");
    const view = { images: grid.node, axes: axes.node, report: report.node }[state.view];
    if (main.firstChild !== view) SB.put(main, view);
    for (const button of nodes.tabs.children) button.setAttribute("aria-pressed", button.value === state.view);
    // The report is about whole runs, whatever is searched for.
    document.body.dataset.view = state.view;
    nodes.sorting.hidden = state.view !== "images";
    nodes.sizing.hidden = state.view === "report";
    nodes.sort.value = query.sort;
    nodes.direction.textContent = query.descending ? "↓" : "↑";
    nodes.direction.setAttribute("aria-label", query.descending ? "Descending; press for ascending" : "Ascending; press for descending");
    nodes.direction.title = query.descending ? "Descending" : "Ascending";
    const toCome = SB.index.pending ? ` (${SB.count(SB.index.pending)} to come)` : "";
    nodes.count.title = SB.index.pending ? `Jobs that were still to be run at ${SB.index.made}; sensebatch gallery adds them` : "";
    nodes.count.textContent = result.length === SB.items.count ? SB.counted(SB.items.count, "item") + toCome : `${SB.count(result.length)} of ${SB.counted(SB.items.count, "item")}`;
    if (state.view === "images") {
      grid.side = state.side;
      if (!keepPlace) grid.node.scrollTop = 0;
      if (!keepPlace) grid.active = 0;
      grid.show(result);
    } else if (state.view === "axes") axes.show(result, axisSide());
    else report.show();
    drawSelection();
    writeAddress({ push });
    // For measurements: how long it took, and for what.
    SB.lastApplied = performance.now() - began;
    SB.lastSearch = query.search;
  }

  function axisSide() {
    return Math.min(state.side, 320);
  }

  function sized() {
    if (state.view === "images") grid.setSide(state.side);
    else if (state.view === "axes") axes.show(query.result, axisSide());
    writeAddress();
  }

  function pickChanged() {
    drawPicksMenu();
    query.forget(["pick", "pick_tag"]);
    nodes.facetColumns = undefined;
    if (!single.isOpen && !compare.isOpen) refreshPicks();
  }

  // Brings marks and counts up to date without taking items away under the reader's eyes.
  function refreshPicks() {
    query.run(countedColumns());
    drawFacets();
    grid.refresh();
    drawSelection();
  }

  function openItem(item, number) {
    state.number = typeof number === "number" ? number : undefined;
    single.open(item, state.number);
    writeAddress({ push: true });
  }

  function openCompare(items) {
    if (items.length < 2 || items.length > SB.MOST_COMPARED) {
      SB.say(`Select two to ${SB.MOST_COMPARED} items to compare them: Space or Ctrl-click`);
      return;
    }
    compare.open(items);
    writeAddress({ push: true });
  }

  function drawSelection() {
    const bar = document.getElementById("selection");
    const chosen = [...grid.selected];
    bar.hidden = !chosen.length || state.view !== "images";
    if (bar.hidden) return;
    const canCompare = chosen.length >= 2 && chosen.length <= SB.MOST_COMPARED;
    SB.put(bar,
      SB.el("b", null, `${SB.count(chosen.length)} selected`),
      SB.button("Compare", () => openCompare(chosen), { disabled: !canCompare, title: canCompare ? "Compare (c)" : `Two to ${SB.MOST_COMPARED} can be compared` }),
      SB.button("Keep", () => SB.picks.toggle(chosen, "keep"), { class: "keep", title: "Keep (k)" }),
      SB.button("Reject", () => SB.picks.toggle(chosen, "reject"), { class: "reject", title: "Reject (r)" }),
      SB.button("Tag", () => SB.askForTag(chosen), { title: "Tag (t)" }),
      SB.button("Clear", () => grid.clearSelection(), { title: "Clear the selection (Esc)" }));
  }

  SB.askForTag = (items, done) => {
    if (!items.length) return;
    const field = SB.el("input", { type: "text", list: "known-tags", "aria-label": "Tag", maxlength: 100, autocomplete: "off" });
    const add = (event) => {
      event.preventDefault();
      const tag = field.value.trim();
      dialog.close();
      if (tag) {
        SB.picks.set(items, { tag });
        SB.picks.say(`Tagged ${items.length === 1 ? SB.items.ids[items[0]] : SB.counted(items.length, "item")}: ${tag}`);
      }
      done?.();
    };
    const dialog = SB.dialog("Tag", { class: "small" },
      SB.el("form", { onsubmit: add },
        SB.el("label", null, `Tag ${items.length === 1 ? SB.items.ids[items[0]] : SB.counted(items.length, "item")}`, field),
        SB.el("datalist", { id: "known-tags" }, SB.picks.tags.map((tag) => SB.el("option", { value: tag }))),
        SB.el("div", { class: "buttons" }, SB.button("Cancel", () => dialog.close()), SB.el("button", { type: "submit", class: "primary" }, "Add the tag"))));
    dialog.addEventListener("keydown", (event) => event.stopPropagation());
    dialog.showModal();
    field.focus();
  };

  SB.showHelp = () => {
    const keys = [
      ["← → ↑ ↓, Page, Home, End", "move; Enter opens"], ["Space, Ctrl-click, Shift-click", "select; on a phone, press and hold"], ["c", "compare two to four that are selected"],
      ["k, r, t", "keep, reject, tag: what is selected, or in focus"], ["/", "search"], ["g then i, a, r", "images, axes, report"], ["f", "filters"],
      ["+ − 0 1", "zoom in and out, whole image, pixel by pixel; wheel, pinch and double click too"], ["Shift and arrows", "move a zoomed image"], ["[ ]", "images of a story"], ["s", "input, output, or both"], ["i", "prompt, settings and figures"], ["Esc", "close, clear"],
    ];
    const searches = [["red circle", "both words, in prompt, id, tags, matrix values or metadata"], ["\"red circle\"", "the phrase"], ["-circle", "without the word"], ["seed:7", "a column is, or contains"], ["num_steps>=20", "a column is at least; also > < <= ="]];
    const dialog = SB.dialog("Help", { class: "help" },
      SB.el("div", { class: "bar" }, SB.el("div", { class: "name" }, SB.el("b", null, "Keys and search")), SB.button("×", () => dialog.close(), { class: "close", "aria-label": "Close" })),
      SB.el("div", { class: "help-body", tabindex: 0 },
        SB.factTable(keys), SB.el("h3", null, "Search"), SB.factTable(searches),
        SB.el("h3", null, "Columns"), SB.el("p", { class: "dim" }, SB.items.columns.map((column) => column.name).join(", ")),
        SB.el("p", { class: "dim" }, `Made ${SB.index.made}. `, "The address of this page keeps the view: copy it to come back to it.")));
    dialog.addEventListener("keydown", (event) => event.stopPropagation());
    dialog.showModal();
  };

  let going;
  function key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || SB.isTyping(event) || document.querySelector("dialog[open]")) return;
    const views = { i: "images", a: "axes", r: "report" };
    if (going && performance.now() - going < 1200 && views[event.key]) {
      going = undefined;
      state.view = views[event.key];
      apply({ push: true });
      event.preventDefault();
      return;
    }
    const inImages = state.view === "images";
    const actions = {
      "/": () => nodes.search.focus(), "?": () => SB.showHelp(), g: () => { going = performance.now(); }, f: () => toggleFilters(),
      k: () => inImages && SB.picks.toggle(grid.chosen(), "keep"), r: () => inImages && SB.picks.toggle(grid.chosen(), "reject"),
      t: () => inImages && SB.askForTag(grid.chosen(), () => grid.focus(grid.active)), c: () => inImages && openCompare([...grid.selected]),
      Escape: () => { if (grid.selected.size) grid.clearSelection(); else if (nodes.picks.open) nodes.picks.open = false; },
      ArrowDown: () => inImages && document.activeElement === document.body && grid.focus(grid.active),
      ArrowRight: () => inImages && document.activeElement === document.body && grid.focus(grid.active),
    };
    if (!(event.key in actions)) return;
    if (actions[event.key]() !== false) event.preventDefault();
  }

  // --- address ------------------------------------------------------------------------------

  // Returns the view as the part of the address after #.
  function address() {
    const words = new URLSearchParams();
    if (state.view !== "images") words.set("view", state.view);
    if (query.search) words.set("q", query.search);
    if (query.sort) words.set("sort", query.sort);
    if (query.descending) words.set("desc", "1");
    if (state.side !== state.usualSide) words.set("size", state.side);
    for (const [name, wanted] of query.facets) {
      if (wanted instanceof Set) for (const word of wanted) words.append(`f.${name}`, word === SB.NONE ? "" : `=${word}`);
      else words.append(`n.${name}`, `${wanted.from}..${wanted.to}`);
    }
    if (state.view === "axes") {
      if (axes.rows) words.set("rows", axes.rows);
      if (axes.columns !== undefined) words.set("columns", axes.columns);
      for (const [name, value] of axes.fixed) words.append(`x.${name}`, fixedWord(name, value));
    }
    if (single?.isOpen) {
      words.set("item", SB.items.key(single.item));
      if (state.number !== undefined) words.set("image", state.number);
    }
    if (compare?.isOpen) for (const item of compare.items) words.append("compare", SB.items.key(item));
    return words.toString();
  }

  // Fixed values are codes, which another gallery of the same runs may count otherwise.
  function fixedWord(name, value) {
    const column = SB.items.byName.get(name);
    return column && column.kind !== "number" && Number(value) >= 0 ? `=${column.words[Number(value)]}` : value;
  }

  function fixedCode(name, word) {
    const column = SB.items.byName.get(name);
    return word.startsWith("=") && column?.words ? String(column.words.indexOf(word.slice(1))) : word;
  }

  state.usualSide = state.side;

  function writeAddress({ push = false } = {}) {
    if (applying) return;
    const words = address();
    if (words === state.address) return;
    state.address = words;
    const url = `#${words}`;
    try {
      if (push) history.pushState(null, "", url);
      else history.replaceState(null, "", url);
    } catch {
      location.hash = url;
    }
  }

  function readAddress() {
    const words = new URLSearchParams(location.hash.slice(1));
    applying = true;
    state.view = words.get("view") in VIEWS ? words.get("view") : "images";
    query.search = nodes.search.value = words.get("q") ?? "";
    query.sort = words.get("sort") ?? "";
    if (!["", "id", "prompt"].includes(query.sort) && !SB.items.byName.has(query.sort)) query.sort = "";
    query.descending = words.get("desc") === "1";
    state.side = Math.max(72, Math.min(512, Number(words.get("size")) || state.usualSide));
    nodes.size.value = state.side;
    query.facets.clear();
    axes.fixed.clear();
    for (const [name, value] of words) readWord(name, value);
    if (words.has("rows")) axes.rows = words.get("rows");
    if (words.has("columns")) axes.columns = words.get("columns");
    apply();
    const byKey = words.has("item") || words.has("compare") ? SB.items.byKey() : new Map();
    const compared = words.getAll("compare").map((one) => byKey.get(one)).filter((one) => one !== undefined);
    const item = byKey.get(words.get("item"));
    if (item === undefined) single.close();
    else {
      const number = words.has("image") ? Number(words.get("image")) : undefined;
      state.number = Number.isInteger(number) && number >= 0 && number < SB.items.images(item) ? number : undefined;
      if (state.view === "images") {
        const place = grid.result.indexOf(item);
        if (place >= 0) { grid.active = place; grid.scrollTo(place); }
      }
      single.open(item, state.number);
    }
    if (compare.isOpen) compare.close();
    if (compared.length >= 2) compare.open(compared.slice(0, SB.MOST_COMPARED));
    applying = false;
    state.address = location.hash.slice(1);
  }

  function readWord(name, value) {
    const column = SB.items.byName.get(name.slice(2));
    if (!column) return;
    if (name.startsWith("f.") && column.kind !== "number") {
      const chosen = query.facets.get(column.name) ?? new Set();
      chosen.add(value.startsWith("=") ? value.slice(1) : SB.NONE);
      query.facets.set(column.name, chosen);
    } else if (name.startsWith("n.") && column.kind === "number") {
      const [from, to] = value.split("..").map(Number);
      if (!Number.isNaN(from) && !Number.isNaN(to)) query.facets.set(column.name, { from, to });
    } else if (name.startsWith("x.")) axes.fixed.set(column.name, fixedCode(column.name, value));
  }
})();
