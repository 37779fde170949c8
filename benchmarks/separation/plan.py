"""What a run measures: groups of arms on the same concept sets and seeds.

Groups of two concepts share their first pairs and seeds, so an arm that stands in several groups is drawn once. A
picture costs 0.4 to 0.6 s of one core, an adapter 20 to 40 s; the minutes below are those of two cores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from . import methods
from .methods import Arm
from .run import Key


@dataclass(frozen=True)
class Group:
    """Arms compared with one another.

    size: concepts per set (1: each concept alone); sets and seeds: how many, seeds per set; same_class: sets whose
    concepts share a class word; of: only sets of these concepts, each of them where
    they are alone; title: for the page.
    """

    name: str
    title: str
    size: int
    sets: int
    seeds: int
    arms: tuple[str, ...]
    same_class: bool = False
    of: tuple[str, ...] = ()

    def key_sets(self) -> list[Key]:
        if self.size == 1:
            pairs = methods.concept_sets("reporting", 2, self.sets)
            return [(name,) for name in self.of or dict.fromkeys(name for names in pairs for name in names)]
        split = "all" if self.same_class else "reporting"
        found = methods.concept_sets(split, self.size, None, self.same_class)
        return [names for names in found if not self.of or set(names) <= set(self.of)][: self.sets]

    @property
    def apart(self) -> bool:
        """Whether its pictures are kept out of the numbers over all pairs of concepts."""
        return self.size != 2 or self.same_class or bool(self.of)

    def numbers(self) -> list[int]:
        return list(range(methods.REPORT_FROM, methods.REPORT_FROM + self.seeds))


MAIN = ("lora_merged", "tara", "tova", "tova_loda", "tova_loda_afg", "paper_code")
LORAS = ("lora_merged", "tara", "tova_loda_afg", "lora_routed", "lora_routed_no_loda")

KINDS = {
    "value": ("tova", "tova_loda_afg"),
    "key": ("tok_key", "tok_key_loda_afg"),
    "key_value": ("tok_key_value", "tok_key_value_loda_afg"),
    "lora": ("lora_kind", "lora_kind_loda_afg"),
    "LoRA file": ("lora_routed_alone", "lora_routed"),
    "LoRA file, merged": ("lora_merged", "lora_merged"),
    "tara": ("tara_kind", "tara_kind_loda_afg"),
    "lora_key_value": ("lora_key_value", "lora_key_value_loda_afg"),
    "perfusion": ("perfusion", "perfusion_loda_afg"),
    "infusion": ("infusion", "infusion_loda_afg"),
    "para": ("para", "para_loda_afg"),
}
"""Rows of the table of kinds: the arm that draws a concept alone, and the one that draws several by the default."""
AT_GUIDANCE = {
    kind: (
        "lora_merged", f"lora_{kind}", f"lora_{kind}_unguided",
        *(
            f"lora_{arm}_guidance_{guidance}"
            for guidance in methods.GUIDANCES
            for arm in ("merged", kind, f"{kind}_unguided", f"{kind}_conditional")
        ),
    )
    for kind in ("routed", "alone")
}  # fmt: skip
"""Arms of LoRAs, several and each alone, at each guidance."""
KINDS_OF = ("bobo", "lumo", "nero")

SAYABLE = ("bobo", "pixa", "ozzy")
"""Reported concepts whose look the model draws in four of five pictures when it is described in words, without any
adapter (arm `described` of group "single"); the others come in less than two of five."""

FULL = (
    Group("single", "Each concept alone", 1, 3, 16, ("base", "described", "lora_merged", "tara", "perfusion", "tova")),
    Group("main", "Two concepts", 2, 4, 64, MAIN),
    Group(
        "adapters", "Two concepts, what an adapter changes", 2, 2, 48,
        ("base", "described", "lora_merged", "lora_key_value", "tara", "perfusion", "tova", "tok_key",
         "tok_key_value", "tova_masked", "tova_attention_masked"),
    ),
    Group(
        "separation", "Two concepts, what separates them", 2, 2, 48,
        ("tova", "tova_loda", "tova_afg", "tova_loda_afg", "tova_loda_afg_hard", "tova_loda_symmetric_kl",
         "tova_loda_bhattacharyya", "tova_loda_kl", "paper_code", "paper_mended", "tova_best_of_3", "tova_more_steps",
         "base_loda_afg", "described_loda_afg", "lora_merged_loda_afg", "tara_loda_afg", "perfusion_loda_afg",
         "tok_key_value_loda_afg"),
    ),
    Group("sayable", "Two concepts that words can say", 2, 3, 48, MAIN, of=SAYABLE),
    Group("three", "Three concepts", 3, 2, 48, MAIN),
    Group("sayable_three", "Three concepts that words can say", 3, 1, 48, MAIN, of=SAYABLE),
    Group(
        "three_remedies", "Three concepts that words can say, remedies", 3, 1, 48,
        ("tova_loda_afg", "tova_loda_afg_longer", "tova_loda_afg_more_updates", "tova_loda_afg_larger",
         "tova_loda_afg_guided"), of=SAYABLE,
    ),
    Group("same", "Two concepts of one class", 2, 2, 32, MAIN, same_class=True),
    Group("four", "Four concepts", 4, 1, 48, MAIN),
    Group(
        "loras_same", "Ordinary LoRAs, two concepts of one class", 2, 2, 64,
        ("lora_merged", "lora_routed", "lora_routed_no_loda", "lora_routed_undivided", "lora_routed_slices"),
        same_class=True,
    ),
    Group(
        "loras_three", "Ordinary LoRAs, three concepts", 3, 2, 64,
        ("lora_merged", "tara", "lora_routed", "lora_routed_no_loda", "lora_routed_slices"),
    ),
    Group("loras_four", "Ordinary LoRAs, four concepts", 4, 1, 64, LORAS),
    Group(
        "loras_mixed", "A LoRA and a value adapter", 2, 2, 64, ("lora_routed", "lora_and_value", "tova_loda_afg"),
    ),
    Group(
        "loras_whole", "LoRAs with feed-forward layers and convolutions", 2, 2, 64,
        ("lora_merged", "lora_routed", "lora_whole_merged", "lora_whole_routed"),
    ),
    Group(
        "values_same", "Value adapters, two concepts of one class", 2, 2, 32,
        ("tova_loda_afg", "tova_loda_afg_undivided", "paper_code"), same_class=True,
    ),
    Group(
        "loras_updates", "Ordinary LoRAs, three concepts, more updates", 3, 2, 16,
        ("lora_routed", "lora_routed_more_updates"),
    ),
    Group("loras", "Ordinary LoRAs, two concepts", 2, 4, 64, LORAS),
    Group(
        "loras_plan", "Ordinary LoRAs, two concepts, a plan without guidance", 2, 4, 64,
        ("lora_routed", "lora_routed_plain_plan", "lora_routed_no_loda", "lora_routed_no_loda_plain_plan"),
    ),
    Group("loras_guidance", "Ordinary LoRAs, two concepts, by guidance", 2, 4, 24, AT_GUIDANCE["routed"]),
    Group("loras_guidance_alone", "The same, each concept alone", 1, 3, 16, AT_GUIDANCE["alone"]),
    Group(
        "as_routed", "LoRAs trained as they will be routed", 2, 2, 24,
        ("lora_routed", "lora_as_routed", "lora_as_routed_masked"),
    ),
    Group(
        "as_routed_single", "The same, each concept alone", 1, 2, 16,
        ("lora_merged", "lora_as_routed", "lora_as_routed_masked"),
    ),
    Group("kinds_alone", "Every kind, each concept alone", 1, 3, 16, tuple(a for a, _ in KINDS.values()), of=KINDS_OF),
    Group("kinds_pairs", "Every kind, two concepts", 2, 2, 16, tuple(a for _, a in KINDS.values()), of=KINDS_OF),
    Group("kinds_three", "Every kind, three concepts", 3, 1, 16, tuple(a for _, a in KINDS.values()), of=KINDS_OF),
    Group(
        "beyond", "Two concepts, beyond the paper", 2, 2, 32,
        ("tova", "tova_loda", "tova_loda_afg", "tova_loda_sign", "tova_loda_raw", "tova_loda_iou",
         "tova_loda_afg_overlapping", "tova_masked_loda_afg", "tova_attention_masked_loda_afg", "tova_similarities",
         "tova_suppression", "tova_loda_suppression"),
    ),
    Group(
        "other_papers", "Two concepts, words in stages and encoder features reused", 2, 2, 32,
        ("described", "described_in_stages", "tova_loda_afg", "tova_loda_afg_reuse"),
    ),
)  # fmt: skip
"""About 12,000 pictures and 60 adapters: 70 minutes on two cores that do nothing else."""

QUICK = (
    Group("single", "Each concept alone", 1, 1, 4, ("lora_merged", "tova")),
    Group("main", "Two concepts", 2, 1, 8, ("described", "lora_merged", "tova", "tova_loda", "tova_loda_afg")),
)

PAIRS = (
    ("tova", "lora_merged"), ("tara", "lora_merged"), ("tara", "tova"), ("perfusion", "tova"), ("tova", "tok_key"),
    ("tova", "tok_key_value"), ("tova_masked", "tova"), ("tova_attention_masked", "tova"),
    ("tova_loda", "tova"), ("tova_afg", "tova"), ("tova_loda_afg", "tova"), ("tova_loda_afg", "tova_loda"),
    ("tova_loda_afg", "tova_loda_afg_hard"),
    ("tova_loda_afg_longer", "tova_loda_afg"), ("tova_loda_afg_more_updates", "tova_loda_afg"),
    ("tova_loda_afg_larger", "tova_loda_afg"), ("tova_loda_afg_guided", "tova_loda_afg"),
    ("lora_routed", "lora_merged"), ("lora_routed", "tara"), ("lora_routed", "tova_loda_afg"),
    ("lora_routed", "lora_routed_no_loda"), ("lora_routed", "lora_routed_undivided"), ("lora_as_routed", "lora_routed"),
    ("lora_as_routed_masked", "lora_routed"),
    ("lora_routed_no_loda", "tova_loda_afg"), ("lora_routed_more_updates", "lora_routed"),
    ("lora_routed", "lora_routed_slices"), ("lora_routed_no_loda", "lora_merged"), ("lora_and_value", "lora_routed"),
    ("lora_routed_plain_plan", "lora_routed"), ("lora_routed_no_loda_plain_plan", "lora_routed_no_loda"),
    ("lora_routed", "lora_routed_unguided"), ("lora_alone", "lora_alone_unguided"),
    *(
        (f"lora_{kind}_guidance_{guidance}", f"lora_{other}_guidance_{guidance}")
        for kind in AT_GUIDANCE
        for guidance in methods.GUIDANCES
        for other in ("merged", f"{kind}_unguided", f"{kind}_conditional")
    ),
    ("lora_and_value", "tova_loda_afg"), ("lora_whole_routed", "lora_whole_merged"),
    ("lora_whole_routed", "lora_routed"),
    ("tova_loda_afg", "tova_loda_afg_undivided"),
    ("tova_loda_afg", "lora_merged"), ("tova_loda_afg", "tara"), ("tova_loda_afg", "paper_code"),
    ("paper_mended", "paper_code"), ("tova_best_of_3", "tova"), ("tova_more_steps", "tova"),
    ("tova_loda_afg", "tova_best_of_3"), ("tova_loda_afg", "tova_more_steps"), ("base_loda_afg", "base"),
    ("described_loda_afg", "described"), ("lora_merged_loda_afg", "lora_merged"), ("tara_loda_afg", "tara"),
    ("perfusion_loda_afg", "perfusion"), ("tok_key_value_loda_afg", "tok_key_value"),
    ("tova_loda_symmetric_kl", "tova_loda"), ("tova_loda_bhattacharyya", "tova_loda"), ("tova_loda_kl", "tova_loda"),
    ("tova_loda_sign", "tova_loda"), ("tova_loda_raw", "tova_loda"), ("tova_loda_iou", "tova_loda"),
    ("tova_loda_suppression", "tova_loda"), ("tova_loda_suppression", "tova_loda_afg"),
    ("tova_suppression", "tova"), ("tova_similarities", "tova"),
    ("tova_loda_afg_overlapping", "tova_loda_afg"), ("tova_masked_loda_afg", "tova_loda_afg"),
    ("tova_attention_masked_loda_afg", "tova_loda_afg"),
    ("described_in_stages", "described"), ("tova_loda_afg_reuse", "tova_loda_afg"),
)  # fmt: skip
"""(one, other): differences and McNemar tests that are reported where both were measured on the same pictures."""


def resized(groups: tuple[Group, ...], pairs: int | None, seeds: int | None, arms: str | None) -> tuple[Group, ...]:
    """The groups with other numbers of sets and seeds, or with the named arms only ("all": every arm)."""
    out = []
    for group in groups:
        changed = replace(group, sets=pairs or group.sets, seeds=seeds or group.seeds)
        if arms is not None:
            if group.name != "main":
                continue
            changed = replace(changed, arms=tuple(arms.split(",")))
        out.append(changed)
    return tuple(out)


def arms_of(group: Group, table: Mapping[str, Arm]) -> dict[str, Arm]:
    return {name: table[name] for name in group.arms}
