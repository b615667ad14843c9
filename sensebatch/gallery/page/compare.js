// Two to four items side by side: their images zoom together, the settings that differ are marked.
"use strict";

(() => {
  SB.MOST_COMPARED = 4;

  class Compare {
    constructor({ onclose }) {
      this.onclose = onclose;
      this.onlyDifferent = true;
    }

    get isOpen() {
      return Boolean(this.dialog);
    }

    async open(items) {
      this.items = items;
      this.zoom = new SB.Zoom();
      this.frames = SB.el("div", { class: "frames", "data-count": items.length });
      this.table = SB.el("div", { class: "differences" });
      this.dialog = SB.dialog("Compare", { class: "viewer compare", tabindex: -1 },
        SB.el("div", { class: "bar" },
          SB.el("div", { class: "name" }, SB.el("b", null, `Compare ${items.length}`), SB.el("span", { class: "dim" }, "zoom and position are linked")),
          SB.el("div", { class: "buttons zooming" },
            SB.button("−", () => this.zoom.by(1 / 1.5), { title: "Zoom out (−)", "aria-label": "Zoom out" }),
            SB.button("Fit", () => this.zoom.reset(), { title: "Whole images (0)" }),
            SB.button("1:1", () => this.zoom.actual(), { title: "Pixel by pixel (1)" }),
            SB.button("+", () => this.zoom.by(1.5), { title: "Zoom in (+)", "aria-label": "Zoom in" })),
          SB.button("×", () => this.dialog.close(), { class: "close", title: "Close (Esc)", "aria-label": "Close" })),
        SB.el("div", { class: "compare-body" }, this.frames, this.table));
      this.dialog.addEventListener("close", () => {
        this.dialog = undefined;
        this.onclose();
      });
      this.dialog.addEventListener("keydown", (event) => this.key(event));
      this.frames.append(...items.map((item, index) => this.frame(item, index)));
      this.drawTable();
      this.dialog.showModal();
      this.dialog.focus();
    }

    close() {
      this.dialog?.close();
    }

    // Shows what has arrived since they were opened.
    refresh() {
      if (this.dialog) this.drawTable();
    }

    frame(item, index) {
      const pick = SB.picks.of(item);
      const verdict = (word, words) => SB.button(words, () => { SB.picks.toggle([item], word); drawn.replaceWith(this.frame(item, index)); this.dialog.focus(); }, { class: word, "aria-pressed": pick.verdict === word });
      const images = SB.items.images(item);
      const inside = images ? this.picture(item) : SB.el("p", { class: "notice" }, SB.items.byName.get("status").shown(item) === "done" ? SB.noImage(item) : SB.items.byName.get("error_type")?.shown(item) || "not drawn");
      const drawn = SB.el("figure", { class: "frame" }, inside,
        SB.el("figcaption", null, SB.el("span", { class: "letter" }, "ABCD"[index]), SB.el("b", { class: "id" }, SB.nameOf(item)), SB.el("span", { class: "buttons" }, verdict("keep", "Keep"), verdict("reject", "Reject"))));
      return drawn;
    }

    picture(item) {
      const view = new SB.View(this.zoom, `Image of ${SB.items.ids[item]}`);
      const note = SB.el("p", { class: "stage-note", hidden: true }, "The image file is missing");
      view.plane.append(SB.layer(item, 0, view, { onmissing: () => { note.hidden = false; }, alt: SB.items.prompts.of(item) ?? "" }));
      view.node.append(note);
      return view.node;
    }

    key(event) {
      if (event.ctrlKey || event.metaKey || event.altKey || SB.isTyping(event)) return;
      const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
      const move = moves[event.key];
      if (move && this.zoom.scale > 1) this.zoom.move(...move.map((one) => (one * 0.2) / this.zoom.scale));
      else if (event.key === "d") { this.onlyDifferent = !this.onlyDifferent; this.drawTable(); }
      else if (event.key === "?") SB.showHelp();
      else if (!this.zoom.key(event)) return;
      event.preventDefault();
    }

    drawTable() {
      const rows = [["Prompt", this.items.map((item) => SB.items.prompts.of(item) ?? "")]];
      for (const [, columns] of SB.columnGroups()) for (const column of columns) {
        const values = this.items.map((item) => column.shown(item));
        if (values.some((value) => value !== "")) rows.push([column.title, values]);
      }
      const differs = ([, values]) => values.some((value) => value !== values[0]);
      const shown = this.onlyDifferent ? rows.filter(differs) : rows;
      const all = SB.el("input", { type: "checkbox", checked: this.onlyDifferent, onchange: () => { this.onlyDifferent = all.checked; this.drawTable(); } });
      SB.put(this.table,
        SB.el("label", { class: "check" }, all, `Only what differs (${rows.filter(differs).length} of ${rows.length}; d)`),
        shown.length
          ? SB.el("table", { class: "facts" },
            SB.el("thead", null, SB.el("tr", null, SB.el("th", null), this.items.map((_, index) => SB.el("th", { scope: "col" }, "ABCD"[index])))),
            SB.el("tbody", null, shown.map((row) => SB.el("tr", { class: differs(row) ? "differs" : "" },
              SB.el("th", { scope: "row" }, row[0]), row[1].map((value) => SB.el("td", null, value))))))
          : SB.el("p", { class: "dim" }, "Nothing known about them differs."));
    }
  }
  SB.Compare = Compare;
})();
