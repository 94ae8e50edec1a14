"""The tables of the report, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from accuracy.cells import estimate_of, is_variant, label_of, markdown, pool, signed, small, with_difference
from accuracy.metrics import Z_95, Estimate
from accuracy.outcomes import DENSE, Label
from accuracy.results import Comparison, Row, Source, StressRow
from accuracy.rivals import RIVAL

SHARING = "sharing"
# Long outputs, and forms of question that the bundled model does not know.
OTHER_TASKS = ("own_history", "continuation", "copying", "variable_tracking", "common_words")
VARIANT_BASES = (DENSE, Label("spark", 0.8, 2), Label("spark", 0.8, 1))


@dataclass(frozen=True)
class Summary:
    """One method over several tasks: questions pooled for exact match, tokens pooled for divergence."""

    label: Label
    size: float
    n: int
    exact_match: float
    difference: Estimate | None
    kl: Estimate | None


class Tables:
    """Everything the report shows, made from rows alone."""

    def __init__(self, rows: Sequence[Row], comparisons: Sequence[Comparison], stress: Sequence[StressRow]):
        self.rows = rows
        self.comparisons = comparisons
        self.stress = stress

    def all(self) -> dict[str, str]:
        """Tables by the name of their marker."""
        return {
            "server": self.server(),
            "server-kl": self.server_kl(),
            "untrained": self.untrained(),
            "sharing": self.sharing(),
            "baselines": self.baselines(),
            "rivals": self.rivals(),
            "agreement": self.agreement(),
            "decisions": self.decisions(),
            "stress": self.stress_table(),
        }

    def summaries(self, source: Source, tasks: Sequence[str], lengths: Sequence[int] | None = None) -> list[Summary]:
        """Methods in order of bytes; only those measured on all of these tasks."""
        labels = dict.fromkeys(label_of(row) for row in self.rows if row.source == source and row.task in tasks)
        found = []
        for label in labels:
            cells = [
                row
                for row in self.rows
                if label_of(row) == label and row.source == source and row.task in tasks
                and (lengths is None or row.length in lengths)
            ]  # fmt: skip
            if {row.task for row in cells} == set(tasks):
                found.append(self._summary(label, cells))
        return sorted(found, key=lambda summary: -summary.size)

    def _summary(self, label: Label, cells: list[Row]) -> Summary:
        n = sum(row.n for row in cells)
        return Summary(
            label,
            cells[0].bytes_per_token_head,
            n,
            sum(row.exact_match * row.n for row in cells) / n,
            pool([self._find(row, "exact_match", "dense") for row in cells]),
            pool([self._find(row, "kl", "dense") for row in cells]),
        )

    def _find(self, row: Row, metric: str, against: str) -> Comparison | None:
        for other in self.comparisons:
            same = (label_of(other), other.task, other.length, other.source) == (
                label_of(row), row.task, row.length, row.source)  # fmt: skip
            if same and (other.metric, other.against) == (metric, against):
                return other
        return None

    def tasks(self, source: Source, *, trained: bool = True) -> list[str]:
        """Tasks of a source in the order they were measured."""
        known = dict.fromkeys(row.task for row in self.rows if row.source == source)
        return [task for task in known if (task not in OTHER_TASKS) == trained]

    def server(self) -> str:
        """Exact match of every setting by task, with the paired difference to dense."""
        blocks = []
        tasks = self.tasks("server")
        for length in sorted({row.length for row in self.rows if row.source == "server"}):
            present = [task for task in tasks if any(r.task == task and r.length == length for r in self._server())]
            if not present:
                continue
            lines = []
            for summary in self.summaries("server", present, [length]):
                cells = [self._cell(summary.label, task, length) for task in present]
                pooled = with_difference(summary.exact_match, summary.difference, summary.label)
                lines.append([str(summary.label), f"{summary.size:.0f}", *cells, pooled])
            lines.sort(key=lambda line: line[0] != "dense")
            header = [f"{length:,} tokens", "bytes", *present, "all questions"]
            blocks.append(markdown(header, lines))
        return "\n\n".join([*blocks, self._server_all_lengths(tasks)])

    def _server_all_lengths(self, tasks: Sequence[str]) -> str:
        """Settings that were measured wherever dense was, over everything."""
        cells = {label: [row for row in self._server() if label_of(row) == label and row.task in tasks]
                 for label in dict.fromkeys(map(label_of, self._server()))}  # fmt: skip
        everywhere = {(row.task, row.length) for row in cells.get(DENSE, [])}
        lines = []
        for label, rows in cells.items():
            if rows and {(row.task, row.length) for row in rows} == everywhere:
                found = self._summary(label, rows)
                right = with_difference(found.exact_match, found.difference, label)
                lines.append([str(label), f"{found.size:.0f}", str(found.n), right, small(found.kl.mean)])
        return markdown(["all lengths", "bytes", "n", "exact match", "KL"], lines)

    def _server(self) -> list[Row]:
        return [row for row in self.rows if row.source == "server"]

    def _row(self, label: Label, task: str, length: int, source: Source) -> Row | None:
        for row in self.rows:
            if (label_of(row), row.task, row.length, row.source) == (label, task, length, source):
                return row
        return None

    def _cell(self, label: Label, task: str, length: int) -> str:
        row = self._row(label, task, length, "server")
        if row is None:
            return "-"
        return with_difference(row.exact_match, estimate_of(self._find(row, "exact_match", "dense")), label)

    def server_kl(self) -> str:
        """Divergence from the dense server by task, all lengths that were measured."""
        cells = dict.fromkeys((row.task, row.length) for row in self._server() if row.task in self.tasks("server"))
        cells = [cell for cell in cells if any((r.task, r.length) == cell and r.kl is not None for r in self._server())]
        labels = [label for label in dict.fromkeys(label_of(row) for row in self._server()) if label != DENSE]
        lines = []
        for task, length in cells:
            found = [self._row(label, task, length, "server") for label in labels]
            lines.append([f"{task}, {length:,}", *("-" if row is None else small(row.kl) for row in found)])
        return markdown(["KL in nats", *map(str, labels)], lines)

    def untrained(self) -> str:
        """Long outputs and unknown forms: what dense makes of them, and how far every setting is from it."""
        lines = []
        for task in OTHER_TASKS:
            for row in (row for row in self._server() if row.task == task):
                found = [
                    self._find(row, metric, against)
                    for metric, against in (("token_accuracy", "expected answer"), ("top1_agreement", "dense"))
                ]
                accuracy, agreement = ("-" if part is None else f"{part.mean:.3f}" for part in found)
                right = with_difference(
                    row.exact_match, estimate_of(self._find(row, "exact_match", "dense")), label_of(row)
                )
                lines.append([task, str(label_of(row)), str(row.n), right, accuracy, agreement, small(row.kl)])
        return markdown(["task", "cache", "n", "exact match", "token accuracy", "agrees with dense", "KL"], lines)

    def sharing(self) -> str:
        """Conditions as they are, and their paired differences."""
        lines = []
        for row in self.comparisons:
            if row.against != SHARING or not row.metric.startswith("kl, "):
                continue
            condition = row.metric.removeprefix("kl, ")
            right = self._sharing(row, f"exact_match, {condition}", SHARING)
            own = "own question"
            differences = [
                signed(self._sharing(row, f"{metric}, {condition}", f"{SHARING}, {own}"))
                for metric in ("exact_match", "kl")
            ]
            between = self._sharing(row, f"kl, {condition}", f"{SHARING}, same question before")
            cells = [condition, f"{right.mean:.3f}", small(row.mean), *differences, signed(between)]
            lines.append([row.task, str(label_of(row)), *cells])
        header = ["task", "cache", "prefix", "exact match", "KL", "exact match, to own", "KL, to own",
                  "KL, to same before"]  # fmt: skip
        return markdown(header, lines)

    def _sharing(self, row: Comparison, metric: str, against: str) -> Comparison | None:
        for other in self.comparisons:
            if (other.metric, other.against) == (metric, against) and (label_of(other), other.task) == (
                label_of(row), row.task):  # fmt: skip
                return other
        return None

    def baselines(self) -> str:
        """Every simulated method over all simulated tasks, in order of bytes."""
        return self._simulated(lambda label: not is_variant(label))

    def decisions(self) -> str:
        """Variants of the default beside it."""
        return self._simulated(lambda label: label in VARIANT_BASES or is_variant(label), to_default=True)

    def _simulated(self, wanted: Callable[[Label], bool], *, to_default: bool = False) -> str:
        known = set(self.tasks("simulation"))
        rows = [row for row in self.rows if row.source == "simulation" and row.task in known and wanted(label_of(row))]
        labels = set(map(label_of, rows))
        # Pooled over what every one of them was asked.
        shared = [
            task
            for task in dict.fromkeys(row.task for row in rows)
            if {label_of(row) for row in rows if row.task == task} == labels
        ]
        lines = []
        summaries = [summary for summary in self.summaries("simulation", shared) if wanted(summary.label)]
        for summary in summaries:
            label = summary.label
            ratio = f"{label.key_ratio:g}" if label.key_ratio else "-"
            bits = "-" if label.restore_bits is None else str(label.restore_bits)
            right = with_difference(summary.exact_match, summary.difference, label)
            kl = [small(summary.kl.mean), f"± {small(Z_95 * summary.kl.se)}"]
            lines.append([label.method, ratio, bits, label.values, f"{summary.size:.0f}", right, *kl])
            if to_default:
                lines[-1].append(self._to_default(label))
        header = ["method", "ratio", "bits", "values", "bytes", "exact match", "KL", "95 %"]
        header += ["KL of a question, less the default's"] if to_default else []
        asked = f"{summaries[0].n} questions of {', '.join(shared)}." if summaries else "Nothing measured yet."
        return f"{asked}\n\n{markdown(header, lines)}"

    def _to_default(self, label: Label) -> str:
        found = pool([
            row for row in self.comparisons
            if label_of(row) == label and row.against.startswith(RIVAL) and row.metric == "kl" and is_variant(label)
        ])  # fmt: skip
        return "" if found is None else f"{found.mean:+.4f} ± {Z_95 * found.se:.4f}"

    def rivals(self) -> str:
        """Pairs of methods with about as many bytes, differences pooled over tasks."""
        sizes = {str(label_of(row)): row.bytes_per_token_head for row in self.rows if row.source == "simulation"}
        pairs: dict[tuple[str, str], dict[str, list[Comparison]]] = {}
        for row in self.comparisons:
            if row.against.startswith(RIVAL) and row.task not in OTHER_TASKS and not is_variant(label_of(row)):
                metrics = pairs.setdefault((str(label_of(row)), row.against.removeprefix(RIVAL)), {})
                metrics.setdefault(row.metric, []).append(row)
        lines = []
        for (label, rival), metrics in pairs.items():
            right, kl = pool(metrics["exact_match"]), pool(metrics["kl"])
            cells = [f"{sizes[label]:.0f}", rival, f"{sizes[rival]:.0f}", str(right.n)]
            intervals = [f"{value.mean:+.4f} ± {Z_95 * value.se:.4f}" for value in (right, kl)]
            lines.append([label, *cells, *intervals])
        header = ["cache", "bytes", "against", "bytes", "questions", "exact match, difference", "KL, difference"]
        return markdown(header, lines)

    def agreement(self) -> str:
        """Server and simulation on the same questions, one by one."""
        lines = []
        for same in (row for row in self.comparisons if row.metric == "same outcome"):
            difference, correlation = (
                next(
                    row
                    for row in self.comparisons
                    if (row.metric, row.against, row.task, row.length) == (metric, "server", same.task, same.length)
                    and label_of(row) == label_of(same)
                )
                for metric in ("kl", "correlation of log kl")
            )
            cells = [f"{same.mean:.3f} ({correlation.n})", signed(difference), f"{correlation.mean:.2f}"]
            lines.append([str(label_of(same)), f"{same.task}, {same.length:,}", *cells])
        header = ["cache", "task", "same outcome (n)", "KL, simulation less server", "correlation of log KL"]
        return markdown(header, lines)

    def stress_table(self) -> str:
        """Output errors, one block per head_dim."""
        blocks = []
        kinds = list(dict.fromkeys(row.keys for row in self.stress))
        for head_dim in sorted({row.head_dim for row in self.stress}):
            rows = [row for row in self.stress if row.head_dim == head_dim]
            lines = []
            for method in dict.fromkeys(row.method for row in rows):
                by_kind = {row.keys: row for row in rows if row.method == method}
                size = next(iter(by_kind.values())).key_bytes
                cells = [f"{by_kind[kind].logit_error:.3f} / {by_kind[kind].output_error:.3f}" for kind in kinds]
                lines.append([method, f"{size:.0f}", *cells])
            lines.sort(key=lambda line: -float(line[1]))
            blocks.append(markdown([f"head_dim {head_dim}", "key bytes", *kinds], lines))
        return "\n\n".join(blocks)
