// One item, large: its image, its story, or why it failed, beside everything that is known of it.
"use strict";

(() => {
  const MARK = "<image>";

  class Single {
    constructor({ result, onmove, onclose }) {
      this.result = result;
      this.onmove = onmove;
      this.onclose = onclose;
      this.withPanel = innerWidth > 760;
      this.divide = 50;
    }

    get isOpen() {
      return Boolean(this.dialog);
    }

    // Shows an item. `number` is one of its images; undefined shows a story as a whole.
    async open(item, number) {
      this.item = item;
      this.number = number;
      if (!this.dialog) this.makeDialog();
      this.zoom = new SB.Zoom();
      this.mode = undefined;
      this.detail = null;
      this.draw();
      const wanted = item;
      let detail;
      try {
        detail = await SB.details(item);
      } catch (error) {
        detail = { problem: error.message, inputs: [] };
      }
      if (this.dialog && this.item === wanted) {
        this.detail = detail;
        this.draw();
      }
    }

    makeDialog() {
      this.bar = SB.el("div", { class: "bar" });
      this.body = SB.el("div", { class: "viewer-main" });
      this.panel = SB.el("aside", { class: "panel", "aria-label": "About this item", tabindex: 0 });
      this.dialog = SB.dialog("One item", { class: "viewer", tabindex: -1 }, this.bar, SB.el("div", { class: "viewer-body" }, this.body, this.panel));
      this.dialog.addEventListener("close", () => {
        this.dialog = undefined;
        this.onclose();
      });
      this.dialog.addEventListener("keydown", (event) => this.key(event));
      this.dialog.showModal();
      this.dialog.focus();
    }

    close() {
      this.dialog?.close();
    }

    // Shows what has arrived since the item was opened.
    refresh() {
      if (!this.dialog) return;
      this.drawPanel();
      const asked = this.body.querySelector(".asked");
      if (asked) asked.textContent = SB.items.prompts.of(this.item) ?? "";
    }

    place() {
      return this.result().indexOf(this.item);
    }

    step(by) {
      const result = this.result();
      const place = this.place();
      const next = place < 0 ? 0 : place + by;
      if (next < 0 || next >= result.length) return SB.say(by > 0 ? "This is the last one" : "This is the first one");
      const opening = this.open(result[next]);
      this.onmove(next);
      return opening;
    }

    // Goes to another image of the same item.
    turn(by) {
      const images = SB.items.images(this.item);
      if (images < 2) return;
      const now = this.number ?? (by > 0 ? -1 : images);
      const next = now + by;
      this.number = next < 0 || next >= images ? undefined : next;
      this.zoom = new SB.Zoom();
      this.onmove(this.place(), this.number);
      this.draw();
    }

    pick(verdict) {
      SB.picks.toggle([this.item], verdict);
      this.drawBar();
    }

    key(event) {
      if (event.ctrlKey || event.metaKey || event.altKey || (SB.isTyping(event) && event.target.type !== "range")) return;
      if (event.target.type === "range" && event.key.startsWith("Arrow")) return;
      if (this.zoom.key(event)) { event.preventDefault(); return; }
      const actions = {
        ArrowRight: () => this.step(1), ArrowLeft: () => this.step(-1),
        "]": () => this.turn(1), "[": () => this.turn(-1),
        k: () => this.pick("keep"), r: () => this.pick("reject"), t: () => SB.askForTag([this.item], () => this.drawBar()),
        i: () => this.togglePanel(), "?": () => SB.showHelp(), s: () => this.cycle(),
      };
      const action = actions[event.key];
      // The panel is scrolled with the arrow keys that do nothing else.
      if (!action) return;
      action();
      event.preventDefault();
    }

    togglePanel() {
      this.withPanel = !this.withPanel;
      this.drawBar();
    }

    // Goes from slider to output to input and back.
    cycle() {
      const modes = this.modes();
      if (!modes.length) return;
      this.mode = modes[(modes.indexOf(this.mode) + 1) % modes.length];
      this.drawBody();
    }

    modes() {
      return this.detail?.inputs?.length && SB.items.images(this.item) ? ["slider", "output", "input"] : [];
    }

    draw() {
      this.drawBar();
      this.drawBody();
      this.drawPanel();
      // Keys go to what has the focus, which may have been drawn again.
      if (!this.dialog.contains(document.activeElement)) this.dialog.focus();
    }

    drawBar() {
      const items = SB.items;
      const place = this.place();
      const pick = SB.picks.of(this.item);
      const focused = this.bar.contains(document.activeElement) ? document.activeElement.title : null;
      this.panel.hidden = !this.withPanel;
      SB.put(
        this.bar,
        SB.el("div", { class: "buttons" },
          SB.button("‹", () => this.step(-1), { title: "Previous (←)", "aria-label": "Previous", disabled: place <= 0 }),
          SB.button("›", () => this.step(1), { title: "Next (→)", "aria-label": "Next", disabled: place < 0 || place >= this.result().length - 1 })),
        SB.el("div", { class: "name" },
          SB.el("b", { class: "id" }, SB.nameOf(this.item)),
          SB.el("span", { class: "dim" }, place >= 0 ? `${SB.count(place + 1)} of ${SB.count(this.result().length)}` : "not among the images shown")),
        pick.tags && SB.el("span", { class: "chips" }, pick.tags.map((tag) =>
          SB.button(`${tag} ×`, () => { SB.picks.set([this.item], { untag: tag }); this.drawBar(); }, { class: "chip", title: `Remove the tag ${tag}` }))),
        SB.el("div", { class: "buttons" },
          SB.button("Keep", () => this.pick("keep"), { class: "keep", title: "Keep (k)", "aria-pressed": pick.verdict === "keep" }),
          SB.button("Reject", () => this.pick("reject"), { class: "reject", title: "Reject (r)", "aria-pressed": pick.verdict === "reject" }),
          SB.button("Tag", () => SB.askForTag([this.item], () => this.drawBar()), { title: "Tag (t)" })),
        SB.el("div", { class: "buttons zooming" },
          SB.button("−", () => this.zoom.by(1 / 1.5), { title: "Zoom out (−)", "aria-label": "Zoom out" }),
          SB.button("Fit", () => this.zoom.reset(), { title: "Whole image (0)" }),
          SB.button("1:1", () => this.zoom.actual(), { title: "Pixel by pixel (1)" }),
          SB.button("+", () => this.zoom.by(1.5), { title: "Zoom in (+)", "aria-label": "Zoom in" })),
        SB.button("Info", () => this.togglePanel(), { class: "soft", title: "Prompt, settings and figures (i)", "aria-pressed": this.withPanel }),
        SB.button("×", () => this.close(), { class: "close", title: "Close (Esc)", "aria-label": "Close" }),
      );
      if (focused) [...this.bar.querySelectorAll("button")].find((button) => button.title === focused)?.focus();
    }

    drawBody() {
      const items = SB.items;
      const status = items.byName.get("status").shown(this.item);
      const images = items.images(this.item);
      this.zoom.views = [];
      if (status !== "done") {
        SB.put(this.body, failure(this.item, status, this.detail));
      } else if (this.detail?.is_story && this.number === undefined) {
        SB.put(this.body, this.story());
      } else if (!images) {
        SB.put(this.body, SB.el("p", { class: "notice" }, SB.isDropped(this.item) ? "This image was rejected and removed." : "This job made no image."));
      } else {
        SB.put(this.body, this.stage(this.number ?? 0));
      }
      const back = images > 1 && this.number !== undefined;
      if (back) this.body.append(this.pager(images));
    }

    pager(images) {
      return SB.el("div", { class: "below" },
        SB.button("[", () => this.turn(-1), { title: "Previous image of this story ([)", "aria-label": "Previous image of this story" }),
        SB.el("span", null, `Image ${this.number + 1} of ${images}`),
        SB.button("]", () => this.turn(1), { title: "Next image of this story (])", "aria-label": "Next image of this story" }),
        SB.button("Whole story", () => { this.number = undefined; this.zoom.reset(); this.onmove(this.place(), undefined); this.draw(); }));
    }

    stage(number) {
      const view = new SB.View(this.zoom, "Image");
      view.onswipe = (by) => this.step(by);
      const note = SB.el("p", { class: "stage-note", hidden: true });
      const onmissing = (hasThumb, url) => {
        note.hidden = false;
        SB.put(note, hasThumb ? "The image file is not where it was; this is its thumbnail. Looked for " : "The image file is missing. Looked for ", SB.el("code", null, decodeURIComponent(url ?? "")));
      };
      const layer = SB.layer(this.item, number, view, { onmissing, alt: SB.items.prompts.of(this.item) ?? "" });
      view.plane.append(layer);
      view.node.append(note);
      const modes = this.modes();
      if (!modes.length) return [view.node];
      this.mode ??= "slider";
      return [view.node, this.inputControls(view, layer, modes)];
    }

    // Lays an input image over the output, and says how they are compared.
    inputControls(view, layer, modes) {
      this.input = Math.min(this.input ?? 0, this.detail.inputs.length - 1);
      const input = SB.el("div", { class: "layer input-layer" });
      const showInput = () => SB.put(input, inputImage(this.detail.inputs[this.input]));
      showInput();
      const line = SB.el("div", { class: "divider", "aria-hidden": "true" });
      view.plane.append(input, line);
      const slider = SB.el("input", { type: "range", min: 0, max: 100, step: 0.5, value: this.divide, "aria-label": "How much of the input is shown, from the left" });
      const draw = () => {
        const part = { slider: Number(slider.value), output: 0, input: 100 }[this.mode];
        this.divide = Number(slider.value);
        input.style.clipPath = `inset(0 ${100 - part}% 0 0)`;
        line.style.left = `${part}%`;
        line.hidden = this.mode !== "slider";
        slider.hidden = this.mode !== "slider";
        for (const button of buttons) button.setAttribute("aria-pressed", button.value === this.mode);
      };
      slider.addEventListener("input", draw);
      const buttons = modes.map((mode) => SB.button({ slider: "Input | output", output: "Output", input: "Input" }[mode], () => { this.mode = mode; draw(); }, { value: mode, title: `${mode} (s goes round)` }));
      // The line can be taken by hand.
      line.addEventListener("pointerdown", (event) => {
        event.stopPropagation();
        line.setPointerCapture(event.pointerId);
        line.onpointermove = (moved) => { slider.value = view.at(moved)[0] * 100; draw(); };
      });
      for (const end of ["pointerup", "pointercancel"]) line.addEventListener(end, () => { line.onpointermove = null; });
      draw();
      const choice = this.detail.inputs.length > 1 && SB.select("Input image", this.detail.inputs.map((one, index) => [String(index), `Input ${index + 1}: ${one.name}`]), String(this.input), (value) => { this.input = Number(value); showInput(); });
      return SB.el("div", { class: "below" }, SB.el("div", { class: "segments" }, buttons), slider, choice);
    }

    story() {
      const items = SB.items;
      const images = items.images(this.item);
      const { thoughts, parts } = SB.readStory(this.detail.text ?? "", images);
      const article = SB.el("article", { class: "story" });
      for (const [question, answer] of this.detail.history ?? []) article.append(SB.el("p", { class: "asked" }, question), SB.el("p", { class: "dim" }, answer));
      article.append(SB.el("p", { class: "asked" }, items.prompts.of(this.item) ?? ""));
      if (this.detail.inputs.length) article.append(this.inputFigures());
      if (thoughts) article.append(SB.el("details", { class: "thought" }, SB.el("summary", null, "Thought"), SB.el("p", null, thoughts)));
      for (const part of parts) {
        if (part.text !== undefined) article.append(SB.el("p", null, part.text));
        else if (part.image >= images) article.append(SB.el("p", { class: "dim" }, "[an image that was not drawn]"));
        else article.append(this.storyImage(part.image));
      }
      if (!parts.length) article.append(SB.el("p", { class: "dim" }, "This story has neither text nor images."));
      return SB.el("div", { class: "reading", tabindex: 0 }, article);
    }

    storyImage(number) {
      const note = SB.el("span", { class: "dim", hidden: true }, "The image file is missing.");
      const thumb = SB.el("span", { class: "thumb" });
      const image = SB.el("img", { alt: `Image ${number + 1}`, src: SB.imageUrl(this.item, number), loading: "lazy" });
      image.addEventListener("error", () => {
        image.replaceWith(thumb);
        if (!SB.showThumb(thumb, this.item, number, 320)) note.hidden = false;
      });
      return SB.el("figure", null,
        SB.el("button", { type: "button", class: "plain", "aria-label": `Enlarge image ${number + 1}`, onclick: () => { this.number = number; this.onmove(this.place(), number); this.draw(); } }, image),
        SB.el("figcaption", { class: "dim" }, `${number + 1}`, note));
    }

    inputFigures() {
      const open = (parent) => { this.open(parent); this.onmove(this.place()); };
      return SB.el("div", { class: "inputs" }, this.detail.inputs.map((input, index) => inputFigure(input, index, SB.items.run[this.item], open)));
    }

    drawPanel() {
      const items = SB.items;
      const detail = this.detail;
      const prompt = items.prompts.of(this.item);
      const sections = [
        SB.el("section", null, SB.el("h3", null, "Prompt"), SB.el("p", { class: "prompt" }, prompt ?? ""),
          SB.el("div", { class: "buttons" }, SB.button("Copy prompt", () => SB.copy(prompt ?? "", "prompt")),
            detail?.manifest && SB.button("Copy manifest row", () => SB.copy(detail.manifest, "manifest row")),
            detail?.command && SB.button("Copy command line", () => SB.copy(detail.command, "command line")))),
      ];
      if (detail?.problem) sections.push(SB.el("p", { class: "warning" }, detail.problem));
      if (detail?.text && !detail.is_story) sections.push(SB.el("section", null, SB.el("h3", null, "Thought"), SB.el("p", { class: "long" }, detail.text.replace(/\s*<\/think>\s*$/, ""))));
      if (detail?.inputs?.length) sections.push(SB.el("section", null, SB.el("h3", null, "Input images"), this.inputFigures()));
      if (detail?.checks) sections.push(SB.el("section", null, SB.el("h3", null, "Checks"), table(detail.checks)));
      for (const [group, columns] of SB.columnGroups()) {
        const rows = columns.map((column) => [column.title, column.shown(this.item), column.name]).filter(([, value]) => value !== "");
        if (rows.length) sections.push(SB.el("section", null, SB.el("h3", null, group), table(rows)));
      }
      if (detail?.more) sections.push(SB.el("section", null, SB.el("h3", null, "More"), table(detail.more)));
      SB.put(this.panel, sections);
    }
  }
  SB.Single = Single;

  // Splits the text of a story into its thoughts, and text and images in their order.
  SB.readStory = (text, images) => {
    const thought = /^\s*<think>([^]*?)(?:<\/think>|$)/.exec(text);
    const rest = thought ? text.slice(thought[0].length) : text;
    const parts = [];
    let number = 0;
    rest.split(MARK).forEach((piece, index, all) => {
      if (piece.trim()) parts.push({ text: piece.trim() });
      if (index < all.length - 1) parts.push({ image: number++ });
    });
    while (number < images) parts.push({ image: number++ });
    return { thoughts: thought?.[1].trim(), parts };
  };

  function failure(item, status, detail) {
    if (status !== "failed") return SB.el("p", { class: "notice" }, status === "pending" ? "This job has not been drawn yet." : status);
    return SB.el("div", { class: "reading", tabindex: 0 }, SB.el("article", { class: "failure" },
      SB.el("h2", null, "Failed: ", SB.items.byName.get("error_type")?.shown(item) || "error"),
      SB.el("p", { class: "message" }, detail?.error ?? ""),
      detail?.traceback
        ? SB.el("details", { open: true }, SB.el("summary", null, "Traceback"), SB.el("pre", { tabindex: 0 }, detail.traceback), SB.button("Copy traceback", () => SB.copy(detail.traceback, "traceback")))
        : detail && SB.el("p", { class: "dim" }, "No traceback was kept.")));
  }

  function table(rows) {
    return SB.el("table", { class: "facts" }, SB.el("tbody", null, rows.map(([title, value]) =>
      SB.el("tr", null, SB.el("th", { scope: "row" }, title), SB.el("td", null, value)))));
  }
  SB.factTable = table;

  function inputImage(input) {
    const image = SB.el("img", { alt: `Input ${input.name}`, draggable: "false" });
    image.addEventListener("error", () => image.replaceWith(SB.el("p", { class: "missing" }, input.url ? `${input.name} is not where it was` : input.problem ?? "The input image is not here")));
    if (input.url) image.src = input.url;
    else setTimeout(() => image.dispatchEvent(new Event("error")));
    return image;
  }

  // Returns an input image with its name, or with the way to the job that made it.
  function inputFigure(input, index, run, open) {
    const parent = input.job === undefined ? undefined : SB.items.byKey().get(`${SB.index.runs[run].id}/${input.job}`);
    const words = `Input ${index + 1}: ${input.job ?? input.name}`;
    return SB.el("figure", null, inputImage(input), SB.el("figcaption", { class: "dim" }, parent === undefined ? words : SB.button(words, () => open(parent), { class: "link", title: "Show the job that made it" })));
  }
})();
