"""Regions of an operator graph as SVG: operators top down, a coloured box around those that share a kernel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.sax.saxutils import escape

import networkx as nx

from fuser.codegen.choice import Choice
from fuser.ir.graph import Operator, OperatorGraph, Region, TensorSpec

COLOURS: Mapping[str, tuple[str, str]] = {
    "gemm": ("#dbeafe", "#2563eb"),
    "attention": ("#ffedd5", "#ea580c"),
    "rowwise": ("#dcfce7", "#16a34a"),
    "pointwise": ("#f3e8ff", "#9333ea"),
    "mlp": ("#ccfbf1", "#0d9488"),
    "pytorch": ("#f3f4f6", "#6b7280"),
}
"""Fill and line of a family's boxes."""
_OTHER = ("#fef9c3", "#ca8a04")

_NODE_WIDTH, _NODE_HEIGHT = 176, 38
_ROW_GAP, _COLUMN_GAP = 16, 18
_PADDING, _TITLE = 12, 22
_RANK_GAP, _BLOCK_GAP = 34, 28
_LANE = 16
_MARGIN = 10


def colours(family: str) -> tuple[str, str]:
    """Fill and line colour of a family."""
    return COLOURS.get(family, _OTHER)


def duration(seconds: float) -> str:
    """A time with three digits and its unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def shape_text(spec: TensorSpec) -> str:
    """A shape as ``2×128×768``."""
    return "×".join(map(str, spec.shape)) or "scalar"


@dataclass
class _Node:
    """One drawn thing at (x, y), its upper left corner. ``row`` is its row inside the block."""

    key: str
    title: str
    detail: str
    hint: str
    row: int = 0
    x: float = 0.0
    y: float = 0.0

    @property
    def middle(self) -> float:
        return self.x + _NODE_WIDTH / 2


@dataclass
class _Block:
    """A box of nodes: a kernel with its time, or a single value that enters or leaves the region (``family`` is
    empty). ``enters`` marks values that are first used below the top."""

    family: str
    time: str
    nodes: list[_Node]
    rank: int = 0
    enters: bool = False
    x: float = 0.0
    y: float = 0.0
    rows: list[list[_Node]] = field(default_factory=list)

    def arrange(self, edges: Iterable[tuple[str, str]]) -> None:
        """Put nodes into rows by their longest path inside the block."""
        inside: nx.DiGraph[str] = nx.DiGraph()
        inside.add_nodes_from(node.key for node in self.nodes)
        inside.add_edges_from((a, b) for a, b in edges if a in inside and b in inside)
        by_key = {node.key: node for node in self.nodes}
        self.rows = []
        for number, generation in enumerate(nx.topological_generations(inside)):
            row = [by_key[key] for key in sorted(generation, key=list(by_key).index)]
            for node in row:
                node.row = number
            self.rows.append(row)

    @property
    def padding(self) -> int:
        return _PADDING if self.family else 0

    @property
    def title_height(self) -> int:
        return _TITLE if self.family else 0

    @property
    def width(self) -> float:
        widest = max(len(row) for row in self.rows)
        return widest * _NODE_WIDTH + (widest - 1) * _COLUMN_GAP + 2 * self.padding

    @property
    def height(self) -> float:
        count = len(self.rows)
        return count * _NODE_HEIGHT + (count - 1) * _ROW_GAP + 2 * self.padding + self.title_height

    def place(self, x: float, y: float) -> None:
        self.x, self.y = x, y
        for number, row in enumerate(self.rows):
            width = len(row) * _NODE_WIDTH + (len(row) - 1) * _COLUMN_GAP
            start = x + (self.width - width) / 2
            for column, node in enumerate(row):
                node.x = start + column * (_NODE_WIDTH + _COLUMN_GAP)
                node.y = y + self.padding + self.title_height + number * (_NODE_HEIGHT + _ROW_GAP)


@dataclass(frozen=True)
class _Edge:
    source: str
    target: str
    label: str


@dataclass(frozen=True)
class Outline:
    """What a picture of a region shows whatever its scheme is, without the graph: texts only, so that it can be stored.

    ``operators`` and ``values``, those that enter or leave, are (key, title, detail, hint); operators have their names
    as keys. ``edges`` are (key, key, label).
    """

    operators: tuple[tuple[str, str, str, str], ...]
    values: tuple[tuple[str, str, str, str], ...]
    edges: tuple[tuple[str, str, str], ...]

    @classmethod
    def of(cls, region: Region) -> Outline:
        """The outline of ``region``."""
        graph = region.graph
        operators = tuple(_operator_texts(graph, op) for op in region.operators)
        edges = _edges(region)
        values = []
        group = graph.group(region.operators)
        for value in dict.fromkeys(graph.base(v) for v in group.inputs if graph.base(v) not in graph.constants):
            values.append(_value_texts(graph, value, "in"))
            for op in region.operators:
                labels = [_view_label(graph, v) for v in op.inputs if graph.base(v) == value]
                if labels:
                    edges.append((f"in:{value}", op.name, _first(labels)))
        for value in group.outputs:
            values.append(_value_texts(graph, value, "out"))
            source = graph.source(value)
            if source is not None:
                edges.append((source.name, f"out:{value}", ""))
        return cls(operators, tuple(values), tuple(edges))

    @classmethod
    def from_json(cls, values: Mapping[str, Sequence[Sequence[str]]]) -> Outline:
        """The outline that ``dataclasses.asdict`` made ``values`` of, also after a round trip through JSON."""
        rows: Any = {name: tuple(map(tuple, found)) for name, found in values.items()}
        return cls(rows["operators"], rows["values"], rows["edges"])


def draw_region(region: Region, choice: Choice) -> str:
    """An SVG document (no external resources) of ``region``, grouped as ``choice`` says.

    ``choice`` must be one of this very region: its groups hold the region's operators. Predicted times carry "≈".
    """
    kernels = []
    for group in choice.groups:
        time = duration(group.seconds)
        names = tuple(op.name for op in group.group.operators)
        kernels.append((group.family, time if group.measured else f"≈ {time}", names))
    return draw_outline(Outline.of(region), kernels)


def draw_outline(outline: Outline, kernels: Iterable[tuple[str, str, Sequence[str]]]) -> str:
    """An SVG document (no external resources) of a region whose kernels are (family, text, names of operators)."""
    nodes = {texts[0]: texts for texts in outline.operators}
    blocks = [_Block(family, text, [_Node(*nodes[name]) for name in names]) for family, text, names in kernels]
    blocks += [_Block("", "", [_Node(*texts)]) for texts in outline.values]
    return _render(blocks, [_Edge(*edge) for edge in outline.edges])


def _operator_texts(graph: OperatorGraph, op: Operator) -> tuple[str, str, str, str]:
    out = graph.values[op.output]
    detail = graph.description(op) or shape_text(out)
    hint = f"{op.name}: {op.kind} → {shape_text(out)} {str(out.dtype).removeprefix('torch.')}"
    if op.expression is not None:
        hint += f"\n{op.expression}"
    return op.name, op.kind, detail, hint


def _value_texts(graph: OperatorGraph, value: str, side: str) -> tuple[str, str, str, str]:
    spec = graph.values[value]
    dtype = str(spec.dtype).removeprefix("torch.")
    return f"{side}:{value}", value, f"{shape_text(spec)} {dtype}", f"{value}: {shape_text(spec)} {dtype}"


def _edges(region: Region) -> list[tuple[str, str, str]]:
    graph = region.graph
    names = {op.name for op in region.operators}
    labels: dict[tuple[str, str], list[str]] = {}
    for op in region.operators:
        for value in op.inputs:
            source = graph.source(value)
            if source is not None and source.name in names:
                labels.setdefault((source.name, op.name), []).append(_view_label(graph, value))
    for a, b in region.edges:
        # The order in which states are touched, where no value is passed on.
        first, then = region.operators[a], region.operators[b]
        shared = {graph.base(v) for v in first.inputs} & {graph.base(v) for v in then.inputs} & set(graph.states)
        labels.setdefault((first.name, then.name), [f"then {', '.join(sorted(shared))}"])
    return [(a, b, _first(found)) for (a, b), found in labels.items()]


def _first(labels: Sequence[str]) -> str:
    return next((label for label in labels if label), "")


def _view_label(graph: OperatorGraph, value: str) -> str:
    producer = graph.producer.get(value)
    return graph.description(producer) if producer is not None and graph.is_alias(producer) else ""


def _render(blocks: list[_Block], edges: list[_Edge]) -> str:
    owner = {node.key: block for block in blocks for node in block.nodes}
    nodes = {node.key: node for block in blocks for node in block.nodes}
    pairs = [(edge.source, edge.target) for edge in edges]
    for block in blocks:
        block.arrange(pairs)
    _rank(blocks, pairs, owner)
    ranks = [[b for b in blocks if b.rank == r] for r in range(max(b.rank for b in blocks) + 1)]
    middles = [[b for b in row if not b.enters] for row in ranks]
    widths = [sum(b.width for b in row) + _BLOCK_GAP * (len(row) - 1) for row in middles]
    widest = max(widths)
    y: float = _MARGIN
    for row, width in zip(ranks, widths, strict=True):
        # Values that enter half way down stand beside the kernels, so that these keep one axis.
        row.sort(key=lambda b: (b.enters, _barycenter(b, pairs, nodes, widest / 2)))
        x = _MARGIN + (widest - width) / 2
        for block in row:
            block.place(x, y)
            x += block.width + _BLOCK_GAP
        y += max(block.height for block in row) + _RANK_GAP
    inner = max(block.x + block.width for block in blocks) - _MARGIN
    height = y - _RANK_GAP + _MARGIN
    far = [edge for edge in edges if not _near(edge, owner, nodes)]
    lanes = _lanes(far, nodes)
    width = 2 * _MARGIN + inner + _LANE * (1 + max(lanes.values(), default=-1)) + (_LANE if far else 0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="system-ui, DejaVu Sans, sans-serif" font-size="12" role="img">',
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#475569"/></marker></defs>',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
    ]
    parts += [_box(block) for block in blocks if block.family]
    parts += [_near_path(edge, nodes) for edge in edges if edge not in lanes]
    parts += [_lane_path(edge, nodes, _MARGIN + inner + _LANE * (lane + 0.75)) for edge, lane in lanes.items()]
    parts += [_node(node, block) for block in blocks for node in block.nodes]
    return "\n".join([*parts, "</svg>"])


def _rank(blocks: Sequence[_Block], pairs: Iterable[tuple[str, str]], owner: Mapping[str, _Block]) -> None:
    """Longest path from the values that enter; those are moved down to just above where they are first used."""
    number = {id(block): i for i, block in enumerate(blocks)}
    order: nx.DiGraph[int] = nx.DiGraph()
    order.add_nodes_from(range(len(blocks)))
    order.add_edges_from((number[id(owner[a])], number[id(owner[b])]) for a, b in pairs if owner[a] is not owner[b])
    for rank, generation in enumerate(nx.topological_generations(order)):
        for i in generation:
            blocks[i].rank = rank
    for i, block in enumerate(blocks):
        if not order.in_degree(i) and order.out_degree(i):
            block.rank = min(blocks[j].rank for j in order.successors(i)) - 1
            block.enters = block.rank > 0 and not block.family


def _barycenter(block: _Block, pairs: Iterable[tuple[str, str]], nodes: Mapping[str, _Node], default: float) -> float:
    own = {node.key for node in block.nodes}
    above = [nodes[a].middle for a, b in pairs if b in own and a not in own and nodes[a].y]
    return sum(above) / len(above) if above else default


def _near(edge: _Edge, owner: Mapping[str, _Block], nodes: Mapping[str, _Node]) -> bool:
    """Whether nothing lies between the two ends."""
    source, target = owner[edge.source], owner[edge.target]
    if source is target:
        return nodes[edge.target].row == nodes[edge.source].row + 1
    last = nodes[edge.source].row == len(source.rows) - 1
    return target.rank == source.rank + 1 and last and nodes[edge.target].row == 0


def _lanes(edges: Iterable[_Edge], nodes: Mapping[str, _Node]) -> dict[_Edge, int]:
    """A vertical lane beside the blocks for every long edge; short ones inside, none shared where they overlap."""
    taken: list[list[tuple[float, float]]] = []
    lanes: dict[_Edge, int] = {}
    for edge in sorted(edges, key=lambda e: nodes[e.target].y - nodes[e.source].y):
        span = (nodes[edge.source].y, nodes[edge.target].y + _NODE_HEIGHT)
        lane = next(
            (i for i, spans in enumerate(taken) if all(span[1] < a or b < span[0] for a, b in spans)), len(taken)
        )
        if lane == len(taken):
            taken.append([])
        taken[lane].append(span)
        lanes[edge] = lane
    return lanes


def _box(block: _Block) -> str:
    fill, line = colours(block.family)
    dashed = ' stroke-dasharray="5 4"' if block.family == "pytorch" else ""
    return (
        f'<rect x="{block.x:.1f}" y="{block.y:.1f}" width="{block.width:.1f}" height="{block.height:.1f}" rx="10" '
        f'fill="{fill}" stroke="{line}" stroke-width="1.5"{dashed}/>'
        f'<text x="{block.x + _PADDING:.1f}" y="{block.y + 19:.1f}" fill="{line}" font-weight="600">'
        f"{escape(block.family)}</text>"
        f'<text x="{block.x + block.width - _PADDING:.1f}" y="{block.y + 19:.1f}" fill="{line}" text-anchor="end">'
        f"{escape(block.time)}</text>"
    )


def _node(node: _Node, block: _Block) -> str:
    line = colours(block.family)[1] if block.family else "#94a3b8"
    radius = 6 if block.family else _NODE_HEIGHT / 2
    return (
        f"<g><title>{escape(node.hint)}</title>"
        f'<rect x="{node.x:.1f}" y="{node.y:.1f}" width="{_NODE_WIDTH}" height="{_NODE_HEIGHT}" rx="{radius}" '
        f'fill="#ffffff" stroke="{line}"/>'
        f'<text x="{node.middle:.1f}" y="{node.y + 16:.1f}" text-anchor="middle" fill="#0f172a" font-weight="600">'
        f"{escape(_cut(node.title, 26))}</text>"
        f'<text x="{node.middle:.1f}" y="{node.y + 31:.1f}" text-anchor="middle" fill="#475569" font-size="11">'
        f"{escape(_cut(node.detail, 27))}</text></g>"
    )


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


_STROKE = 'fill="none" stroke="#475569" stroke-width="1.3" marker-end="url(#arrow)"'


def _near_path(edge: _Edge, nodes: Mapping[str, _Node]) -> str:
    a, b = nodes[edge.source], nodes[edge.target]
    y1, y2 = a.y + _NODE_HEIGHT, b.y
    bend = (y1 + y2) / 2
    curve = f"C{a.middle:.1f} {bend:.1f} {b.middle:.1f} {bend:.1f} {b.middle:.1f} {y2:.1f}"
    path = f'<path d="M{a.middle:.1f} {y1:.1f} {curve}" {_STROKE}/>'
    return path + _edge_label(edge.label, (a.middle + b.middle) / 2 + 6, bend + (4 if y2 - y1 < 2 * _ROW_GAP else -6))


def _lane_path(edge: _Edge, nodes: Mapping[str, _Node], x: float) -> str:
    a, b = nodes[edge.source], nodes[edge.target]
    # Arrivals a little above the middle, departures below, so that the two do not meet on one side of a node.
    y1, y2 = a.y + _NODE_HEIGHT * 0.68, b.y + _NODE_HEIGHT * 0.32
    r = 6
    path = (
        f'<path d="M{a.x + _NODE_WIDTH:.1f} {y1:.1f} H{x - r:.1f} Q{x:.1f} {y1:.1f} {x:.1f} {y1 + r:.1f} '
        f'V{y2 - r:.1f} Q{x:.1f} {y2:.1f} {x - r:.1f} {y2:.1f} H{b.x + _NODE_WIDTH:.1f}" {_STROKE}/>'
    )
    return path + _edge_label(edge.label, b.x + _NODE_WIDTH + 18, y2 - 4)


def _edge_label(label: str, x: float, y: float) -> str:
    if not label:
        return ""
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="#64748b" font-size="10" font-style="italic">{escape(label)}</text>'
