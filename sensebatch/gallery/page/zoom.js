// Images that are zoomed and moved together, by wheel, keys, pointer or two fingers.
"use strict";

(() => {
  const MOST = 64;

  // What linked views share: how much, 1 being the whole image, and which point is in the middle.
  class Zoom {
    constructor() {
      this.views = [];
      this.reset();
    }

    reset() {
      this.scale = 1;
      this.x = 0.5;
      this.y = 0.5;
      this.draw();
    }

    set(scale, x, y) {
      this.scale = Math.max(1, Math.min(MOST, scale));
      const room = 0.5 / this.scale;
      this.x = Math.max(room, Math.min(1 - room, x));
      this.y = Math.max(room, Math.min(1 - room, y));
      this.draw();
    }

    by(factor, x = this.x, y = this.y) {
      // The point under the pointer stays where it is.
      const scale = Math.max(1, Math.min(MOST, this.scale * factor));
      const ratio = this.scale / scale;
      this.set(scale, x + (this.x - x) * ratio, y + (this.y - y) * ratio);
    }

    move(dx, dy) {
      this.set(this.scale, this.x + dx, this.y + dy);
    }

    draw() {
      for (const view of this.views) view.draw();
    }

    // Follows a key; returns whether it was one of zoom's.
    key(event) {
      const step = 0.2 / this.scale;
      const actions = {
        "+": () => this.by(1.5), "=": () => this.by(1.5), "-": () => this.by(1 / 1.5), 0: () => this.reset(), 1: () => this.actual(),
      };
      if (this.scale > 1 && event.shiftKey) {
        Object.assign(actions, { ArrowLeft: () => this.move(-step, 0), ArrowRight: () => this.move(step, 0), ArrowUp: () => this.move(0, -step), ArrowDown: () => this.move(0, step) });
      }
      if (!(event.key in actions)) return false;
      actions[event.key]();
      return true;
    }

    // Shows one pixel of the image as one of the screen, or the whole image again.
    actual(x, y) {
      const view = this.views[0];
      if (!view) return;
      const wanted = view.actualScale();
      if (Math.abs(this.scale - wanted) < 0.01 || wanted <= 1) this.scale > 1 ? this.reset() : this.by(2, x, y);
      else this.set(wanted, x ?? this.x, y ?? this.y);
    }
  }
  SB.Zoom = Zoom;

  // A frame with layers of the same size over one another, of which the first decides the shape.
  class View {
    constructor(zoom, label) {
      this.zoom = zoom;
      zoom.views.push(this);
      this.plane = SB.el("div", { class: "plane" });
      this.node = SB.el("div", { class: "stage", "aria-label": label, role: "group" }, this.plane);
      this.width = 1;
      this.height = 1;
      new ResizeObserver(() => this.draw()).observe(this.node);
      this.listen();
    }

    // Sets the pixels of the image.
    shape(width, height) {
      this.width = width || 1;
      this.height = height || 1;
      this.draw();
    }

    fitted() {
      const scale = Math.min(this.node.clientWidth / this.width, this.node.clientHeight / this.height) || 1;
      // Small images are enlarged, by whole steps so that their pixels stay square.
      const shown = scale > 1 ? Math.max(1, Math.min(Math.floor(scale), 4)) : scale;
      return { width: this.width * shown, height: this.height * shown, scale: shown };
    }

    actualScale() {
      return 1 / (this.fitted().scale * devicePixelRatio);
    }

    draw() {
      const { width, height, scale } = this.fitted();
      const by = this.zoom.scale;
      const left = this.node.clientWidth / 2 - this.zoom.x * width * by;
      const top = this.node.clientHeight / 2 - this.zoom.y * height * by;
      Object.assign(this.plane.style, { width: `${width}px`, height: `${height}px`, transform: `translate(${left}px, ${top}px) scale(${by})` });
      this.plane.classList.toggle("pixels", scale * by * devicePixelRatio >= 3);
      this.node.classList.toggle("zoomed", by > 1);
    }

    // Returns where in the image, from 0 to 1, a pointer is.
    at(event) {
      const box = this.plane.getBoundingClientRect();
      return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    }

    listen() {
      const pointers = new Map();
      let moved = false;
      this.node.addEventListener("wheel", (event) => {
        event.preventDefault();
        this.zoom.by(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0018)), ...this.at(event));
      }, { passive: false });
      this.node.addEventListener("dblclick", (event) => this.zoom.actual(...this.at(event)));
      this.node.addEventListener("pointerdown", (event) => {
        if (event.button || event.target.closest("input, button")) return;
        pointers.set(event.pointerId, event);
        moved = false;
        this.node.setPointerCapture(event.pointerId);
      });
      this.node.addEventListener("pointermove", (event) => {
        const before = pointers.get(event.pointerId);
        if (!before) return;
        const box = this.plane.getBoundingClientRect();
        const dx = (event.clientX - before.clientX) / box.width, dy = (event.clientY - before.clientY) / box.height;
        moved ||= Math.hypot(event.clientX - before.clientX, event.clientY - before.clientY) > 3;
        if (pointers.size === 2) {
          const [other] = [...pointers.values()].filter((one) => one.pointerId !== event.pointerId);
          const apart = (one) => Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY);
          this.zoom.by(apart(event) / (apart(before) || 1), ...this.at(other));
        }
        this.zoom.move(-dx / pointers.size, -dy / pointers.size);
        pointers.set(event.pointerId, event);
      });
      for (const name of ["pointerup", "pointercancel"]) this.node.addEventListener(name, (event) => {
        const before = pointers.get(event.pointerId);
        pointers.delete(event.pointerId);
        // A swipe of one finger over a whole image turns the page.
        if (before && event.pointerType === "touch" && !pointers.size && this.zoom.scale === 1 && this.start && this.onswipe) {
          const across = event.clientX - this.start.clientX;
          if (Math.abs(across) > 60 && Math.abs(event.clientY - this.start.clientY) < 60) this.onswipe(across < 0 ? 1 : -1);
        }
      });
      this.node.addEventListener("pointerdown", (event) => { this.start = pointers.size === 1 ? event : undefined; });
    }
  }
  SB.View = View;

  // Returns an image of an item as a layer: its thumbnail until the image is there, and where it
  // is not. `onmissing` is told when there is nothing but the thumbnail.
  SB.layer = (item, number, view, { onmissing, alt } = {}) => {
    const layer = SB.el("div", { class: "layer" });
    const thumb = SB.el("div", { class: "under" });
    const at = SB.items.first[item] + number;
    const hasThumb = number < SB.items.images(item) && SB.items.cells[at] >= 0;
    if (hasThumb) {
      const [width, height] = SB.index.shapes[SB.items.shapes[at]];
      view.shape(width, height);
      SB.showThumb(thumb, item, number, Math.max(width, height));
      // As large as the plane, whatever that is.
      const grow = () => {
        thumb.style.transform = `scale(${view.plane.clientWidth / width}, ${view.plane.clientHeight / height})`;
      };
      new ResizeObserver(grow).observe(view.plane);
      layer.append(thumb);
    }
    const url = SB.imageUrl(item, number);
    const image = SB.el("img", { alt: alt ?? "", draggable: "false", decoding: "async" });
    image.addEventListener("load", () => {
      view.shape(image.naturalWidth, image.naturalHeight);
      thumb.remove();
    });
    image.addEventListener("error", () => {
      image.remove();
      onmissing?.(hasThumb, url);
    });
    image.src = url;
    layer.append(image);
    return layer;
  };
})();
