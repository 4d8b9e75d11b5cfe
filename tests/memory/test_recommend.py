"""`recommend` never chooses what a real run shows not to fit, and says nothing fits only where nothing does."""

from __future__ import annotations

import random

import pytest
from live_bytes import LENGTH, ROWS, Case, counted_run

import zerolite
from zerolite.memory.recommend import OFFLOADS, RESERVE, Candidate, Recommendation

WORLD = 2


def recommended(case: Case, device_memory: int, host_memory: int | None = None, **options) -> Recommendation:
    return zerolite.recommend(
        case.build(),
        WORLD,
        device_memory,
        host_memory,
        precision=case.precision,
        batch=ROWS,
        length=LENGTH,
        device="cpu",
        **options,
    )


def case_of(case: Case, candidate: Candidate) -> Case:
    return case._replace(stage=candidate.stage, offload=candidate.offload, checkpointing=bool(candidate.checkpointing))


def peaks_on_rank(cases: list[Case]) -> list[int]:
    return [max(counted_run(case).peaks.values()) for case in cases]


def check(ranks, number: int, seed: int) -> str:
    """Random models, precisions and limits: the choice fits, and where there is none, none of those listed does."""
    draw = random.Random(seed)
    limits: list[tuple[int, bool]] = []  # of each measured case: the device's bytes, whether it was recommended
    cases = []
    for _ in range(number):
        case = Case(draw.choice(["llama", "gpt2"]), dtype=draw.choice(["fp32", "bf16"]))
        stages = sorted(draw.sample(range(4), 2))
        ends = recommended(case, 1 << 40, stages=[0, 3], offloads=["none", "parameters"], checkpointing=[False])
        peaks = [candidate.plan.peak_bytes for candidate in ends.candidates]
        limit = int(draw.uniform(0.6 * min(peaks), max(peaks)))
        found = recommended(case, limit, stages=stages)
        for candidate in [found.best] if found.best is not None else found.candidates:
            limits.append((limit, found.best is not None))
            cases.append(case_of(case, candidate))
    for measured in ranks(WORLD).run(peaks_on_rank, cases):
        for (limit, is_recommended), peak, case in zip(limits, measured, cases, strict=True):
            if is_recommended:
                assert peak <= limit, case
            else:
                assert peak > limit * (1 - 2 * RESERVE), case
    num_chosen = sum(is_recommended for _, is_recommended in limits)
    return f"{num_chosen} recommended, {number - num_chosen} without, {len(cases)} measured on each of {WORLD} ranks"


def test_what_is_recommended_fits(ranks):
    """Four random models, precisions and limits of a device; the peak of the choice is measured on real ranks."""
    check(ranks, 4, seed=0)


@pytest.mark.slow
def test_what_is_recommended_fits_in_many(ranks):
    print(check(ranks, 200, seed=1))


def test_the_fastest_that_fits_comes_first_and_each_other_says_why():
    """In the order of seconds to two digits, the simplest of equals first; rejected ones name the bytes they lack."""
    case = Case("llama")
    peaks = sorted(candidate.plan.peak_bytes for candidate in recommended(case, 1 << 40).candidates)
    found = recommended(case, int(peaks[len(peaks) // 2] / (1 - RESERVE)) + 1)
    fitting = [candidate for candidate in found.candidates if candidate.fits]
    assert 0 < len(fitting) < len(found.candidates) and found.best is fitting[0]
    seconds = [float(f"{candidate.plan.time.total_seconds:.1e}") for candidate in fitting]
    assert seconds == sorted(seconds)
    for candidate in found.candidates[len(fitting) :]:
        assert "GiB a device in" in candidate.why and "too many" in candidate.why
    assert found.best.name in str(found).split("\n")[0] and len(str(found).split("\n")) == len(found.candidates)


def test_a_host_has_limits_too():
    """Where the host has no room for what is offloaded, offload is rejected for it; a CPU's memory is the host's."""
    case = Case("llama")
    options = {"precision": case.precision, "batch": ROWS, "length": LENGTH}
    for device in ("cuda", "cpu"):
        roomy = zerolite.recommend(case.build(), WORLD, 1 << 40, device=device, **options)
        least = min(candidate.plan.host_bytes for candidate in roomy.candidates)
        found = zerolite.recommend(case.build(), WORLD, 1 << 40, least, device=device, **options)
        assert {candidate.offload for candidate in found.candidates if candidate.fits} == {"none"}
        assert all("GiB a host" in candidate.why for candidate in found.candidates if candidate.offload != "none")
        peaks = {candidate.stage: candidate.plan for candidate in roomy.candidates if candidate.offload == "none"}
        apart = peaks[0].host_bytes - peaks[3].host_bytes
        assert apart == (WORLD * (peaks[0].peak_bytes - peaks[3].peak_bytes) if device == "cpu" else 0)


def test_nothing_fits_is_said_with_what_is_nearest():
    found = recommended(Case("llama"), 1000, stages=[0, 3], offloads=["none", "parameters"])
    assert found.best is None and "nothing fits" in str(found)
    assert found.candidates[0].plan.peak_bytes == min(candidate.plan.peak_bytes for candidate in found.candidates)
    assert found.as_dict()["best"] is None


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(ValueError, match="offloads= are of none, optimizer, parameters"):
        recommended(Case(), 1 << 30, offloads=["disk"])
    with pytest.raises(ValueError, match="name a preset or a folder"):
        recommended(Case(), 1 << 30, methods={"full": None, "lora": zerolite.adapters.add_lora})
    with pytest.raises(ValueError, match="no configuration is listed"):
        recommended(Case(), 1 << 30, stages=[1], offloads=["parameters"])
    assert set(OFFLOADS) == {"none", "optimizer", "parameters"}
