// The grid: only the tiles in view exist, whatever the number of items.
"use strict";

(() => {
  const GAP = 10;
  const CAPTION = 40;
  // Browsers lay out nothing taller than about 2^24 pixels.
  const TALLEST = 12e6;

  class Grid {
    constructor({ onopen, onselect }) {
      this.onopen = onopen;
      this.onselect = onselect;
      this.result = new Uint32Array(0);
      this.side = 160;
      this.active = 0;
      this.selected = new Set();
      this.tiles = new Map();
      this.spacer = SB.el("div", { class: "spacer", role: "presentation" });
      this.list = SB.el("div", { class: "grid", role: "listbox", "aria-label": "Images", "aria-multiselectable": "true" }, this.spacer);
      this.empty = SB.el("p", { class: "notice", hidden: true }, "Nothing matches. ", SB.button("Clear search and filters", () => this.onclear()));
      this.node = SB.el("div", { class: "scroller", id: "scroller" }, this.list, this.empty);
      this.node.addEventListener("scroll", () => this.draw(), { passive: true });
      this.list.addEventListener("keydown", (event) => this.key(event));
      this.list.addEventListener("focusin", (event) => this.focused(event));
      new ResizeObserver(() => this.layout()).observe(this.node);
    }

    show(result) {
      this.result = result;
      this.active = Math.min(this.active, Math.max(result.length - 1, 0));
      this.clear();
      this.layout();
    }

    setSide(side) {
      const top = this.firstVisible();
      this.side = side;
      this.clear();
      this.layout();
      this.scrollTo(top);
    }

    clear() {
      for (const tile of this.tiles.values()) tile.remove();
      this.tiles.clear();
    }

    layout() {
      const width = this.node.clientWidth - GAP;
      if (width <= 0) return;
      const across = Math.max(1, Math.floor(width / (this.side + GAP)));
      const step = width / across;
      if (across !== this.across || step !== this.step) this.clear();
      this.across = across;
      this.step = step;
      this.rowHeight = step + CAPTION;
      this.rows = Math.ceil(this.result.length / across);
      this.height = this.rows * this.rowHeight + GAP;
      this.ratio = Math.max(1, this.height / TALLEST);
      this.spacer.style.height = `${this.height / this.ratio}px`;
      this.empty.hidden = this.result.length > 0;
      this.draw();
    }

    // Returns how far down the items are that the scroll bar points at.
    top() {
      if (this.ratio === 1) return this.node.scrollTop;
      const most = this.height / this.ratio - this.node.clientHeight;
      return most > 0 ? (this.node.scrollTop / most) * (this.height - this.node.clientHeight) : 0;
    }

    firstVisible() {
      return this.rowHeight ? Math.floor(this.top() / this.rowHeight) * this.across : 0;
    }

    scrollTo(place) {
      const row = Math.floor(place / this.across);
      const top = row * this.rowHeight;
      const view = this.node.clientHeight;
      const now = this.top();
      if (top < now) this.setTop(top);
      else if (top + this.rowHeight + GAP > now + view) this.setTop(top + this.rowHeight + GAP - view);
      this.draw();
    }

    setTop(top) {
      if (this.ratio === 1) this.node.scrollTop = top;
      else this.node.scrollTop = (top / (this.height - this.node.clientHeight)) * (this.height / this.ratio - this.node.clientHeight);
    }

    draw() {
      if (!this.across || !this.node.clientHeight) return;
      const top = this.top();
      const shift = this.ratio === 1 ? 0 : top - this.node.scrollTop;
      const view = this.node.clientHeight;
      const from = Math.max(0, Math.floor((top - view / 2) / this.rowHeight)) * this.across;
      const to = Math.min(this.result.length, Math.ceil((top + view * 1.5) / this.rowHeight) * this.across);
      const wanted = new Set();
      for (let place = from; place < to; place += 1) wanted.add(place);
      if (this.result.length) wanted.add(this.active);
      for (const [place, tile] of this.tiles) {
        if (!wanted.has(place)) { tile.remove(); this.tiles.delete(place); }
      }
      const fresh = document.createDocumentFragment();
      for (const place of wanted) {
        let tile = this.tiles.get(place);
        if (!tile) {
          tile = this.tile(place);
          this.tiles.set(place, tile);
          fresh.append(tile);
        }
        const row = Math.floor(place / this.across);
        tile.style.transform = `translate(${GAP + (place % this.across) * this.step}px, ${GAP + row * this.rowHeight - shift}px)`;
      }
      this.list.append(fresh);
      this.sharpen();
    }

    tile(place) {
      const items = SB.items;
      const item = this.result[place];
      const inner = this.step - GAP;
      const thumb = SB.el("span", { class: "thumb" });
      const box = SB.el("span", { class: "box", style: { height: `${inner}px` } }, thumb);
      const images = items.images(item);
      if (!SB.showThumb(thumb, item, 0, inner)) {
        thumb.remove();
        box.append(this.placeholder(item));
      }
      const caption = SB.el("span", { class: "caption" }, SB.short(items.prompts.of(item)) || items.ids[item]);
      const node = SB.el(
        "div",
        { class: "tile", role: "option", tabindex: place === this.active ? 0 : -1, id: `tile-${place}`,
          "aria-setsize": this.result.length, "aria-posinset": place + 1, "data-item": items.ids[item],
          style: { width: `${inner}px` } },
        box,
        images > 1 && SB.el("span", { class: "badge", title: `${images} images` }, images),
        SB.el("span", { class: "mark", "aria-hidden": "true" }),
        caption,
      );
      node.place = place;
      node.addEventListener("click", (event) => {
        this.focus(place);
        if (event.ctrlKey || event.metaKey || event.shiftKey || this.choosing) this.select(place, event.shiftKey);
        else this.onopen(place);
      });
      let held;
      node.addEventListener("touchstart", () => { held = setTimeout(() => { this.choosing = true; this.select(place, false); this.skipClick = true; }, 500); }, { passive: true });
      for (const name of ["touchend", "touchmove", "touchcancel"]) node.addEventListener(name, (event) => {
        clearTimeout(held);
        if (name === "touchend" && this.skipClick) { this.skipClick = false; event.preventDefault(); }
      });
      this.mark(node, item);
      return node;
    }

    placeholder(item) {
      const status = SB.items.byName.get("status")?.shown(item) ?? "";
      if (status === "failed") {
        const type = SB.items.byName.get("error_type")?.shown(item);
        return SB.el("span", { class: "placeholder failed" }, SB.el("b", null, "failed"), type && SB.el("span", null, type));
      }
      if (status && status !== "done") return SB.el("span", { class: "placeholder" }, status);
      const snippet = SB.items.snippets.get(item);
      if (snippet !== undefined) return SB.el("span", { class: "snippet" }, snippet);
      return SB.el("span", { class: "placeholder" }, SB.items.images(item) ? "file missing or unreadable" : SB.noImage(item));
    }

    mark(node, item) {
      const pick = SB.picks.of(item);
      node.dataset.pick = pick.verdict ?? "";
      const isSelected = this.selected.has(item);
      node.setAttribute("aria-selected", isSelected);
      const prompt = SB.short(SB.items.prompts.of(item));
      const run = SB.index.runs.length > 1 && SB.index.runs[SB.items.run[item]].name;
      const said = [SB.items.ids[item], run, prompt, pick.verdict === "keep" && "kept", pick.verdict === "reject" && "rejected", pick.tags && `tagged ${pick.tags.join(", ")}`];
      node.setAttribute("aria-label", said.filter(Boolean).join(", "));
    }

    // Brings captions and marks up to date.
    refresh() {
      for (const [place, tile] of this.tiles) {
        const item = this.result[place];
        this.mark(tile, item);
        const prompt = SB.items.prompts.of(item);
        if (prompt) tile.querySelector(".caption").textContent = SB.short(prompt);
      }
    }

    // Large tiles show the image itself once scrolling has paused.
    sharpen() {
      clearTimeout(this.sharpening);
      const inner = this.step - GAP;
      if (inner * Math.min(devicePixelRatio, 1.5) < SB.index.sheets.side * 1.25) return;
      this.sharpening = setTimeout(() => {
        const view = this.node.getBoundingClientRect();
        for (const [place, tile] of this.tiles) {
          const box = tile.getBoundingClientRect();
          const url = SB.imageUrl(this.result[place]);
          if (box.bottom < view.top || box.top > view.bottom || tile.querySelector("img") || !url) continue;
          const thumb = tile.querySelector(".thumb");
          if (!thumb) continue;
          const image = SB.el("img", { class: "sharp", alt: "", decoding: "async", src: url });
          image.addEventListener("error", () => image.remove());
          thumb.append(image);
        }
      }, 180);
    }

    focus(place) {
      const before = this.tiles.get(this.active);
      if (before) before.tabIndex = -1;
      this.active = Math.max(0, Math.min(place, this.result.length - 1));
      this.scrollTo(this.active);
      const tile = this.tiles.get(this.active);
      if (tile) {
        tile.tabIndex = 0;
        tile.focus({ preventScroll: true });
      }
    }

    focused(event) {
      const tile = event.target.closest(".tile");
      if (tile) this.active = tile.place;
    }

    select(place, isRange) {
      const from = isRange && this.lastSelected !== undefined ? this.lastSelected : place;
      const isAdding = isRange || !this.selected.has(this.result[place]);
      for (let at = Math.min(from, place); at <= Math.max(from, place); at += 1) {
        if (isAdding) this.selected.add(this.result[at]);
        else this.selected.delete(this.result[at]);
      }
      this.lastSelected = place;
      this.refresh();
      this.onselect();
    }

    clearSelection() {
      this.selected.clear();
      this.choosing = false;
      this.refresh();
      this.onselect();
    }

    // Returns the items that a key is about: the selected ones, else the one in focus.
    chosen() {
      if (this.selected.size) return [...this.selected];
      return this.result.length ? [this.result[this.active]] : [];
    }

    key(event) {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const rows = Math.max(1, Math.floor(this.node.clientHeight / this.rowHeight));
      const moves = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: this.across, ArrowUp: -this.across, PageDown: rows * this.across, PageUp: -rows * this.across, Home: -Infinity, End: Infinity };
      if (event.key in moves) {
        const place = this.active + moves[event.key];
        if ((event.key === "ArrowDown" || event.key === "ArrowUp") && (place < 0 || place >= this.result.length)) return;
        this.focus(place);
      } else if (event.key === "Enter") this.onopen(this.active);
      else if (event.key === " ") this.select(this.active, event.shiftKey);
      else return;
      event.preventDefault();
    }
  }
  SB.Grid = Grid;
})();
