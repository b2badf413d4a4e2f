"use strict";
(async () => {
  const $ = (id) => document.getElementById(id);
  const map = JSON.parse($("map").textContent);
  const unpack = async (id) => {
    const text = atob($(id).textContent);
    const packed = Uint8Array.from(text, (char) => char.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  };

  // ---- cells ----------------------------------------------------------------------------------

  const PLANES = ["mapped", "data", "filled", "zero", "entropy", "changed", "touched"];
  const total = map.areas.reduce((sum, area) => sum + area.cells, 0);
  const raw = await unpack("cells");
  // levels[k] has one tile for 2^k cells of an area, which start at multiples of 2^k from address 0 on.
  const levels = [];
  const big = (text) => BigInt(text);
  const cellSize = BigInt(map.cellSize);
  let before = 0;
  const areas = map.areas.map((area, number) => {
    const made = {
      number, block: area.block, start: big(area.start), end: big(area.end), cells: area.cells, before,
      origin: Number(big(area.start) / cellSize),  // the number of its first cell
      parts: area.parts.map((part) => ({
        block: part.block, offset: big(part.offset), start: big(part.start),
        end: big(part.start) + big(part.length), pageSize: BigInt(part.pageSize),
      })),
    };
    before += area.cells;
    return made;
  });
  const firstLevel = areas.map((area) => {
    const planes = {};
    PLANES.forEach((name, k) => { planes[name] = raw.subarray(k * total + area.before, k * total + area.before + area.cells); });
    return { origin: area.origin, length: area.cells, planes };
  });
  levels.push(firstLevel);
  const halved = (level) => {
    const origin = Math.floor(level.origin / 2);
    const length = Math.ceil((level.origin + level.length) / 2) - origin;
    const planes = {};
    for (const name of PLANES) planes[name] = new Uint8Array(length);
    for (let tile = 0; tile < length; tile++) {
      let mapped = 0, weight = 0, entropy = 0;
      const sums = { data: 0, filled: 0, zero: 0, changed: 0, touched: 0 };
      for (let k = 0; k < 2; k++) {
        const cell = (origin + tile) * 2 + k - level.origin;
        if (cell < 0 || cell >= level.length || !level.planes.mapped[cell]) continue;
        mapped++;
        for (const name in sums) sums[name] += level.planes[name][cell];
        weight += level.planes.data[cell];
        entropy += level.planes.entropy[cell] * level.planes.data[cell];
      }
      planes.mapped[tile] = mapped ? 1 : 0;
      // Rounded up: a page among many is not lost.
      for (const name in sums) planes[name][tile] = mapped ? Math.ceil(sums[name] / mapped) : 0;
      planes.entropy[tile] = weight ? Math.round(entropy / weight) : 0;
    }
    return { origin, length, planes };
  };
  const levelOf = (k) => {
    while (levels.length <= k) levels.push(levels[levels.length - 1].map(halved));
    return levels[k];
  };

  // ---- colours --------------------------------------------------------------------------------

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const rgb = (text) => [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16));
  const RAMP = ["#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725"].map(rgb);
  const THEMES = {
    light: { hole: "#e6e9ef", zero: "#c3cad6", filled: "#58aef5", changed: "#e0430b", touched: "#d6369b", text: "#1c2430", faint: "#667085", line: "#c9d0db" },
    dark: { hole: "#262b36", zero: "#454d5c", filled: "#8ecbff", changed: "#ff5c26", touched: "#ff8ad8", text: "#e6e9ef", faint: "#8a94a6", line: "#343b49" },
  };
  let theme, known;
  const choose = () => {
    const texts = THEMES[dark.matches ? "dark" : "light"];
    theme = Object.fromEntries(Object.entries(texts).map(([name, text]) => [name, rgb(text)]));
    theme.css = texts;
    known = new Map();
  };
  const mix = (a, b, share) => a.map((value, k) => value + (b[k] - value) * share);
  const byEntropy = (bits) => {
    const place = Math.min(Math.max(bits, 0), 8), low = Math.min(Math.floor(place), 7);
    return mix(RAMP[low], RAMP[low + 1], place - low);
  };
  const css = (colour) => `rgb(${colour.map(Math.round).join(",")})`;
  const overlay = () => ({
    changed: map.against !== null && $("showChanged").checked,
    touched: map.workingSet && $("showTouched").checked,
  });
  const paint = (planes, tile) => {
    if (!planes.mapped[tile]) return null;
    const data = planes.data[tile], filled = planes.filled[tile], zero = planes.zero[tile];
    const shown = overlay();
    const changed = shown.changed ? planes.changed[tile] : 0, touched = shown.touched ? planes.touched[tile] : 0;
    const key = [data, filled, zero, planes.entropy[tile], changed, touched, shown.changed, shown.touched].join();
    let found = known.get(key);
    if (found) return found;
    const weights = [
      [byEntropy(planes.entropy[tile] / 32), Math.sqrt(data / 255)],
      [theme.filled, Math.sqrt(filled / 255)],
      [theme.zero, zero / 255],
      [theme.hole, Math.max(0, 255 - data - filled - zero) / 255],
    ];
    const sum = weights.reduce((all, [, weight]) => all + weight, 0);
    let colour = sum ? [0, 1, 2].map((k) => weights.reduce((all, [c, weight]) => all + c[k] * weight, 0) / sum) : theme.hole;
    if (shown.changed || shown.touched) {
      const light = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2];
      colour = mix(mix(colour, [light, light, light], 0.5), theme.hole, 0.6);
    }
    if (touched) colour = mix(colour, theme.touched, 0.45 + 0.55 * touched / 255);
    if (changed) colour = mix(colour, theme.changed, 0.45 + 0.55 * changed / 255);
    found = css(colour);
    known.set(key, found);
    return found;
  };

  // ---- texts ----------------------------------------------------------------------------------

  const hex = (value) => "0x" + value.toString(16);
  const size = (bytes) => {
    const value = Number(bytes), units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let k = 0, left = value;
    while (left >= 1024 && k < units.length - 1) { left /= 1024; k++; }
    return `${Number.isInteger(left) ? left : left.toFixed(1)} ${units[k]}`;
  };
  const percent = (value) => value === 0 ? "0 %" : value >= 0.1 ? `${(value * 100).toFixed(0)}\u00a0%` : `${(value * 100).toFixed(1)}\u00a0%`;
  const partAt = (area, place) => area.parts.find((part) => part.start <= place && place < part.end);
  const whatIs = (planes, tile) => {
    const words = [], share = (name) => planes[name][tile] / 255;
    const add = (value, text) => { if (value > 0) words.push(value > 0.995 ? text : `${percent(value)} ${text}`); };
    add(share("data"), "data");
    add(share("filled"), "one word again and again");
    add(share("zero"), "stored zeros");
    add(Math.max(0, 1 - share("data") - share("filled") - share("zero")), "not stored");
    return words.join(", ");
  };

  // ---- layout: rows of tiles, which start at multiples of their length ----------------------------

  const LEFT = 112, RIGHT = 14, GAP = 16, HEAD = 18, BASE = 6, LARGEST = 96;
  const scroller = $("scroller"), canvas = $("tiles"), strip = $("strip"), context = canvas.getContext("2d");
  let zoom = 0;     // tiles of 2^zoom cells; below 0, tiles of one cell that are 2^-zoom times as large
  let layout = null, selected = null, hovered = null;
  const tileOf = (z) => ({ level: Math.max(z, 0), side: Math.min(BASE * 2 ** Math.max(-z, 0), LARGEST) });
  const layOut = (z, height) => {
    const { level, side } = tileOf(z);
    const room = Math.max(scroller.clientWidth - LEFT - RIGHT, side * 2);
    const columns = 2 ** Math.max(1, Math.floor(Math.log2(room / side)));
    // What is left of the room makes tiles wider.
    const width = Math.min(room / columns, side * 1.9);
    height = height || side;
    let top = 10, rows = 0;
    const bands = levelOf(level).map((tiles, number) => {
      const first = Math.floor(tiles.origin / columns), last = Math.ceil((tiles.origin + tiles.length) / columns);
      // The name of a single row is beside its tiles, if they leave room.
      const beside = last - first === 1 && tiles.length * width < room / 2;
      const start = top + (beside ? 0 : HEAD);
      const band = { area: areas[number], tiles, first, beside, rows: last - first, top: start, bottom: start + Math.max((last - first) * height, 14) };
      top = band.bottom + (beside ? GAP / 2 : GAP);
      rows += band.rows;
      return band;
    });
    return { z, level, columns, width, height, bands, total: top, rows };
  };
  const largest = () => {
    let z = 0;
    while (layOut(z).total > scroller.clientHeight && z < 40 && 2 ** z < total) z++;
    return z;
  };
  const smallest = -4;

  const tileAt = (x, y) => {
    const band = layout.bands.find((each) => each.top <= y && y < each.bottom);
    if (!band || x < LEFT) return null;
    const column = Math.floor((x - LEFT) / layout.width), row = Math.floor((y - band.top) / layout.height);
    if (column >= layout.columns || row >= band.rows) return null;
    const tile = (band.first + row) * layout.columns + column - band.tiles.origin;
    if (tile < 0 || tile >= band.tiles.length || !band.tiles.planes.mapped[tile]) return null;
    return { band, tile };
  };
  const placeOf = ({ band, tile }) => {
    const length = cellSize << BigInt(layout.level), start = BigInt(band.tiles.origin + tile) * length;
    const first = start > band.area.start ? start : band.area.start;
    const end = start + length < band.area.end ? start + length : band.area.end;
    return { area: band.area, first, end };
  };
  const topOf = (area, place) => {
    const band = layout.bands[area.number];
    const tile = Number(place / (cellSize << BigInt(layout.level)));
    return band.top + (Math.floor(tile / layout.columns) - band.first) * layout.height;
  };

  // ---- drawing --------------------------------------------------------------------------------

  const fit = (target, width, height) => {
    const ratio = devicePixelRatio || 1;
    if (target.width !== Math.round(width * ratio) || target.height !== Math.round(height * ratio)) {
      target.width = Math.round(width * ratio); target.height = Math.round(height * ratio);
      target.style.width = `${width}px`; target.style.height = `${height}px`;
    }
    const drawn = target.getContext("2d");
    drawn.setTransform(ratio, 0, 0, ratio, 0, 0);
    drawn.clearRect(0, 0, width, height);
    return drawn;
  };
  const draw = () => {
    const width = scroller.clientWidth, height = scroller.clientHeight, scrolled = scroller.scrollTop;
    fit(canvas, width, height);
    const rowLength = (cellSize << BigInt(layout.level)) * BigInt(layout.columns);
    const gap = layout.width > 4 ? 0.5 : 0;
    for (const band of layout.bands) {
      if (band.bottom < scrolled || band.top - HEAD > scrolled + height) continue;
      context.textBaseline = "middle"; context.textAlign = "left";
      context.font = "600 12px ui-sans-serif, system-ui, 'DejaVu Sans', sans-serif";
      context.fillStyle = theme.css.text;
      const names = [...new Set(band.area.parts.map((part) => part.block))];
      const title = band.area.block === null ? names.join(", ") : `block ${band.area.block}`;
      if (band.beside) {
        const column = ((band.tiles.origin % layout.columns) + layout.columns) % layout.columns;
        const right = (column + band.tiles.length) * layout.width, y = band.top - scrolled + Math.max(layout.height, 14) / 2;
        const before = right > (width - LEFT - RIGHT) / 2;
        context.textAlign = before ? "right" : "left";
        context.fillText(title, LEFT + (before ? column * layout.width - 8 : right + 8), y, (width - LEFT - RIGHT) / 2);
      } else {
        context.fillText(title, LEFT, band.top - scrolled - HEAD / 2, width - LEFT - RIGHT);
      }
      const from = Math.max(0, Math.floor((scrolled - band.top) / layout.height));
      const to = Math.min(band.rows, Math.ceil((scrolled + height - band.top) / layout.height));
      const every = 2 ** Math.max(0, Math.ceil(Math.log2(20 / layout.height)));
      for (let row = from; row < to; row++) {
        const y = band.top + row * layout.height - scrolled;
        const start = (band.first + row) * layout.columns - band.tiles.origin;
        for (let column = 0; column < layout.columns; column++) {
          const tile = start + column;
          if (tile < 0 || tile >= band.tiles.length) continue;
          const colour = paint(band.tiles.planes, tile);
          if (!colour) continue;
          context.fillStyle = colour;
          context.fillRect(LEFT + column * layout.width, y, layout.width - gap, layout.height - gap);
          if (layout.height >= 48) note(band, tile, column, y);
        }
        if (row % every === 0 && (row === 0 || (band.rows - row) * layout.height >= 12)) {
          context.font = "11px ui-monospace, 'DejaVu Sans Mono', monospace";
          context.textAlign = "right"; context.fillStyle = theme.css.faint;
          context.fillText(hex(BigInt(band.first + row) * rowLength), LEFT - 10, y + Math.max(layout.height, 12) / 2);
        }
      }
    }
    if (selected) outline(selected, theme.css.text, 2);
    drawStrip();
    $("scale").textContent = `${size(cellSize << BigInt(layout.level))} a tile`;
    $("in").disabled = zoom <= smallest; $("out").disabled = zoom >= largest();
  };
  const note = (band, tile, column, y) => {
    const planes = band.tiles.planes;
    if (!planes.data[tile]) return;
    const muted = overlay().changed || overlay().touched;
    context.font = "11px ui-monospace, 'DejaVu Sans Mono', monospace";
    context.textAlign = "center";
    context.fillStyle = muted ? theme.css.text : planes.entropy[tile] > 150 ? "#10131a" : "#ffffff";
    context.fillText((planes.entropy[tile] / 32).toFixed(1), LEFT + (column + 0.5) * layout.width, y + layout.height / 2);
  };
  const outline = ({ area, place }, colour, line) => {
    const band = layout.bands[area.number], tile = Number(place / (cellSize << BigInt(layout.level)));
    const column = tile % layout.columns, y = topOf(area, place) - scroller.scrollTop;
    context.strokeStyle = colour; context.lineWidth = line;
    context.strokeRect(LEFT + column * layout.width - 1, y - 1, Math.max(layout.width, 4) + 1, Math.max(layout.height, 4) + 1);
  };
  const drawStrip = () => {
    const width = strip.parentElement.firstElementChild === strip ? strip.clientWidth || 34 : 34, height = scroller.clientHeight;
    const drawn = fit(strip, width, height);
    let level = 0;
    while (total / 2 ** level > height && level < 40) level++;
    const tiles = levelOf(level), all = tiles.reduce((sum, each) => sum + each.length, 0);
    let at = 0;
    for (const each of tiles) {
      for (let tile = 0; tile < each.length; tile++, at++) {
        const colour = paint(each.planes, tile);
        if (!colour) continue;
        drawn.fillStyle = colour;
        drawn.fillRect(6, at * height / all, width - 12, Math.max(1, height / all) + 0.5);
      }
    }
    const marks = shownCells().map((cell) => cell / total * height);
    drawn.strokeStyle = theme.css.text; drawn.lineWidth = 1.5;
    drawn.strokeRect(3, marks[0] + 0.75, width - 6, Math.max(marks[1] - marks[0], 4) - 1.5);
  };
  // The first and the last cell that can be seen, counted over all areas.
  const shownCells = () => {
    const top = scroller.scrollTop, bottom = top + scroller.clientHeight, found = [];
    for (const y of [top, bottom]) {
      let cell = 0;
      for (const band of layout.bands) {
        const share = Math.min(Math.max((y - band.top) / (band.bottom - band.top), 0), 1);
        cell += share * band.area.cells;
      }
      found.push(cell);
    }
    return found;
  };

  // ---- moving ---------------------------------------------------------------------------------

  const relayout = () => {
    layout = layOut(zoom);
    const left = scroller.clientHeight - layout.total;
    // All fits: higher tiles, up to squares.
    if (left > 0 && zoom >= 0) layout = layOut(zoom, Math.min(layout.width, layout.height + left / layout.rows));
    $("spacer").style.height = `${layout.total}px`;
    draw();
  };
  const middle = () => {
    const y = scroller.scrollTop + scroller.clientHeight / 2;
    const band = layout.bands.find((each) => each.bottom > y) || layout.bands[layout.bands.length - 1];
    const row = Math.min(Math.max(Math.floor((y - band.top) / layout.height), 0), band.rows - 1);
    const start = BigInt((band.first + row) * layout.columns) * (cellSize << BigInt(layout.level));
    const place = start < band.area.start ? band.area.start : start >= band.area.end ? band.area.end - 1n : start;
    return { area: band.area, place, y: scroller.clientHeight / 2 };
  };
  // Zoom by steps of two; the place stays at the height that it has.
  const zoomTo = (z, around) => {
    z = Math.min(Math.max(z, smallest), largest());
    if (z === zoom || !areas.length) return;
    const { area, place, y } = around || (selected ? { ...selected, y: Math.min(Math.max(topOf(selected.area, selected.place) - scroller.scrollTop, 0), scroller.clientHeight) } : middle());
    zoom = z;
    relayout();
    scroller.scrollTop = topOf(area, place) - y;
    draw(); remember();
  };
  const remember = () => {
    if (!selected) return;
    const block = selected.area.block === null ? "" : `${encodeURIComponent(selected.area.block)}:`;
    history.replaceState(null, "", `#at=${block}${hex(selected.place)}&zoom=${zoom}`);
  };
  const find = (text) => {
    const [, block, number] = /^(?:(.*):)?\s*(0x[0-9a-f]+|[0-9]+)\s*$/i.exec(text) || [];
    if (number === undefined) return null;
    const place = BigInt(number);
    const area = areas.find((each) => each.block === (block === undefined ? null : block) && each.start <= place && place < each.end)
      || (block === undefined && areas.every((each) => each.block !== null) && areas[0].end > place ? areas[0] : null);
    return area ? { area, place } : null;
  };
  const show = (found, z) => {
    if (z !== undefined) { zoom = Math.min(Math.max(z, smallest), largest()); relayout(); }
    select(found);
    scroller.scrollTop = topOf(found.area, found.place) - scroller.clientHeight / 3;
    draw();
  };

  // ---- the page of memory that is selected --------------------------------------------------------

  const unpacked = new Map();
  const bytesAt = async (area, place, length) => {
    const number = map.bytes.pieces.findIndex(([where, start, size]) =>
      where === area.number && big(start) <= place && place < big(start) + BigInt(size));
    if (number < 0) return null;
    if (!unpacked.has(number)) unpacked.set(number, await unpack(`bytes${number}`));
    const first = Number(place - big(map.bytes.pieces[number][1]));
    return unpacked.get(number).subarray(first, first + length);
  };
  const element = (kind, text, cls) => {
    const made = document.createElement(kind);
    if (text !== undefined) made.textContent = text;
    if (cls) made.className = cls;
    return made;
  };
  const facts = (pairs) => {
    const list = element("dl");
    for (const [name, text, cls] of pairs) if (text) list.append(element("dt", name), element("dd", text, cls));
    return list;
  };
  const dump = (bytes, place) => {
    const lines = [], each = $("detail").clientWidth > 540 ? 16 : 8;
    for (let at = 0; at < bytes.length; at += each) {
      const part = [...bytes.subarray(at, at + each)];
      const left = part.map((byte) => byte.toString(16).padStart(2, "0"));
      const text = part.map((byte) => byte >= 32 && byte < 127 ? String.fromCharCode(byte) : ".").join("");
      const halves = each === 16 ? [left.slice(0, 8), left.slice(8)] : [left.slice(0, 4), left.slice(4)];
      lines.push(`${(place + BigInt(at)).toString(16).padStart(9, "0")}  ${halves.map((half) => half.join(" ")).join("  ")}  ${text}`);
    }
    return lines.join("\n");
  };
  const select = async (found) => {
    const part = partAt(found.area, found.place) || found.area.parts[0];
    const pageSize = part.pageSize;
    let place = found.place < part.start ? part.start : found.place;
    place = part.start + (place - part.start) / pageSize * pageSize;
    selected = { area: found.area, place };
    remember();
    const cell = Number(place / cellSize) - found.area.origin, planes = firstLevel[found.area.number].planes;
    const detail = $("detail");
    const where = found.area.block === null ? hex(place) : `${found.area.block}:${hex(place)}`;
    const one = cellSize <= pageSize;
    const content = [
      element("h2", one ? "Page" : `Cell of ${size(cellSize)}`),
      facts([
        ["address", where, "mono"],
        ["block", `${part.block} + ${hex(part.offset + place - part.start)}`, "mono"],
        ["content", whatIs(planes, cell)],
        ["entropy", planes.data[cell] ? `${(planes.entropy[cell] / 32).toFixed(1)} bits a byte` : ""],
        ["changed", map.against === null ? "" : one ? (planes.changed[cell] ? "yes" : "no") : percent(planes.changed[cell] / 255)],
        ["touched", map.workingSet ? (one ? (planes.touched[cell] ? "yes" : "no") : percent(planes.touched[cell] / 255)) : ""],
      ]),
    ];
    const pager = element("div", undefined, "pager");
    const step = (text, by) => {
      const button = element("button", text), to = place + by;
      button.disabled = to < found.area.start || to >= found.area.end;
      button.onclick = () => show({ area: found.area, place: to });
      pager.append(button);
    };
    step("◂ page before", -pageSize); step("next page ▸", pageSize);
    content.push(pager);
    const bytes = await bytesAt(found.area, place, Number(pageSize));
    if (selected.area !== found.area || selected.place !== place) return;
    const stored = planes.data[cell] || planes.filled[cell] || planes.zero[cell];
    if (bytes) content.push(element("pre", dump(bytes, place)));
    else if (!stored) content.push(element("p", "Not stored: the guest reads zeros here."));
    else content.push(element("p", "Its bytes are not in this file: see below."));
    detail.replaceChildren(...content);
    draw();
  };

  // ---- what does not change -------------------------------------------------------------------------

  const key = (list, colours, text) => {
    const swatch = element("div", undefined, "swatch");
    for (const colour of colours) { const span = element("span"); span.style.background = css(colour); swatch.append(span); }
    list.append(swatch, element("div", text));
  };
  const legend = () => {
    const list = element("div", undefined, "key"), pages = map.pages;
    const all = pages.data + pages.filled + pages.zero + pages.hole || 1;
    const share = (number) => `${number.toLocaleString("en")} pages, ${percent(number / all)}`;
    key(list, Array.from({ length: 16 }, (_, k) => byEntropy(k / 2 + 0.25)), `data, 0 to 8 bits of entropy a byte: ${share(pages.data)}`);
    key(list, [theme.filled], `one word again and again: ${share(pages.filled)}`);
    key(list, [theme.zero], `stored zeros: ${share(pages.zero)}`);
    key(list, [theme.hole], `not stored, zeros: ${share(pages.hole)}`);
    if (map.against !== null) key(list, [theme.changed], `changed against ${map.against}: ${share(pages.changed)}`);
    if (map.workingSet) key(list, [theme.touched], `touched after a restore: ${share(pages.touched)}`);
    const bar = element("div", undefined, "bar"), most = Math.max(1, ...map.levels);
    map.levels.forEach((number, k) => {
      const span = element("span");
      span.style.height = `${number / most * 100}%`; span.style.background = css(byEntropy(k / 2 + 0.25));
      span.title = `${k / 2} to ${(k + 1) / 2} bits: ${number.toLocaleString("en")} pages`;
      bar.append(span);
    });
    const axis = element("div", undefined, "axis");
    axis.append(element("span", "0 bits"), element("span", "data pages by entropy"), element("span", "8 bits"));
    $("legend").replaceChildren(list, bar, axis);
  };
  const about = () => {
    const had = map.bytes.pieces.reduce((sum, [, , length]) => sum + length, 0);
    const which = map.bytes.first ? `the first ${size(map.bytes.limit)} of stored pages` : "the stored pages of a range";
    const more = map.bytes.complete ? "" : map.bytes.first ? "" : `, of which this is the first ${size(map.bytes.limit)}`;
    const whole = map.bytes.complete && map.bytes.first;
    $("about").replaceChildren(
      element("h2", "In this file"),
      element("p", had === 0 ? "No bytes of pages are in this file."
        : `${size(had)} of memory: ${whole ? "all stored pages" : which + more}. For others: pyqmigrate map --html FILE --bytes RANGE.`),
      element("p", `A cell of the map is ${size(cellSize)}. Scroll; zoom with + and −, Ctrl and the wheel, or a double click.`),
      ...map.notes.map((text) => element("p", text)),
    );
  };
  $("title").textContent = map.snapshot;
  document.title = `${map.snapshot}: memory map`;
  $("subtitle").textContent = [size(map.length), map.machine, map.against === null ? "" : `compared with ${map.against}`].filter(Boolean).join(" · ");
  $("muteChanged").hidden = map.against === null; $("muteTouched").hidden = !map.workingSet;
  for (const id of ["muteChanged", "muteTouched"]) if ($(id).hidden) $(id).style.display = "none";

  // ---- events ---------------------------------------------------------------------------------

  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return tileAt(event.clientX - box.left, event.clientY - box.top + scroller.scrollTop);
  };
  const around = (event) => {
    const tile = at(event);
    if (!tile) return undefined;
    const { area, first } = placeOf(tile);
    return { area, place: first, y: event.clientY - canvas.getBoundingClientRect().top };
  };
  const redraw = () => { known = new Map(); draw(); };
  scroller.addEventListener("scroll", () => requestAnimationFrame(draw));
  scroller.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    zoomTo(zoom + (event.deltaY < 0 ? -1 : 1), around(event));
  }, { passive: false });
  canvas.addEventListener("mousemove", (event) => {
    hovered = at(event);
    if (!hovered) { $("status").textContent = ""; return; }
    const { area, first, end } = placeOf(hovered), part = partAt(area, first) || area.parts.find((each) => each.start >= first);
    const planes = hovered.band.tiles.planes, tile = hovered.tile;
    $("status").textContent = [
      `${hex(first)} to ${hex(end)}`, part ? part.block : "", whatIs(planes, tile),
      planes.data[tile] ? `${(planes.entropy[tile] / 32).toFixed(1)} bits a byte` : "",
      map.against !== null && planes.changed[tile] ? `${percent(planes.changed[tile] / 255)} changed` : "",
      map.workingSet && planes.touched[tile] ? `${percent(planes.touched[tile] / 255)} touched` : "",
    ].filter(Boolean).join("  ·  ");
  });
  canvas.addEventListener("click", (event) => {
    const tile = at(event);
    if (tile) { const { area, first } = placeOf(tile); select({ area, place: first }); }
  });
  canvas.addEventListener("dblclick", (event) => zoomTo(zoom - 2, around(event)));
  strip.addEventListener("click", (event) => {
    const box = strip.getBoundingClientRect();
    let cell = (event.clientY - box.top) / box.height * total;
    const area = areas.find((each) => { if (cell < each.cells) return true; cell -= each.cells; return false; });
    if (area) { const place = BigInt(area.origin + Math.floor(cell)) * cellSize; scroller.scrollTop = topOf(area, place < area.start ? area.start : place) - scroller.clientHeight / 2; }
  });
  $("in").onclick = () => zoomTo(zoom - 1);
  $("out").onclick = () => zoomTo(zoom + 1);
  $("whole").onclick = () => { zoomTo(largest()); scroller.scrollTop = 0; };
  $("go").onsubmit = (event) => {
    event.preventDefault();
    const found = find($("address").value);
    if (found) show(found, Math.min(zoom, 0)); else $("status").textContent = "No memory is at this address.";
  };
  for (const id of ["showChanged", "showTouched"]) $(id).onchange = redraw;
  addEventListener("keydown", (event) => {
    if (event.target.tagName === "INPUT") return;
    if (event.key === "+" || event.key === "=") zoomTo(zoom - 1);
    else if (event.key === "-") zoomTo(zoom + 1);
    else if (event.key === "Home") $("whole").onclick();
  });
  addEventListener("resize", () => { zoom = Math.min(zoom, largest()); relayout(); });
  dark.addEventListener("change", () => { choose(); legend(); draw(); });

  choose();
  zoom = largest();
  relayout();
  legend(); about();
  if (!areas.length) $("detail").replaceChildren(element("p", "No memory is in this snapshot."));
  else {
    const linked = new URLSearchParams(location.hash.slice(1));
    const found = linked.get("at") && find(decodeURIComponent(linked.get("at")));
    if (found) show(found, linked.has("zoom") ? Number(linked.get("zoom")) : undefined);
    else $("detail").replaceChildren(element("h2", "Page"), element("p", "Click on a tile to see what is there."));
  }
  document.body.dataset.ready = "yes";
  // What a test asks.
  window.memoryMap = { state: () => ({ zoom, columns: layout.columns, level: layout.level, tile: size(cellSize << BigInt(layout.level)), selected: selected && hex(selected.place) }) };
})();
