"""Schedules: pure choices that fit the GPU, and the tuned tables in front of them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from qkernels.triton_kernels import (
    GemmConfig,
    GemvConfig,
    choose_gemm_config,
    choose_gemv_config,
    tune,
)
from qkernels.triton_kernels import config as configs
from qkernels.triton_kernels.config import Problem, unrolled_fields
from qkernels.triton_kernels.product import fields_of_a_group


def test_few_rows_fill_every_processor() -> None:
    for n, k in itertools.product((256, 1024, 4096), (4096, 14336)):
        problem = Problem(1, n, k, 4, 32, 128, 2, (9, 0), 132)
        gemm = choose_gemm_config(problem)
        tiles = -(-k // 256)
        programs = -(-n // gemm.block_n) * gemm.split_k
        assert programs >= 132 or gemm.split_k == tiles
        assert gemm.split_k <= tiles
        gemv = choose_gemv_config(problem)
        assert -(-n // gemv.block_n) * gemv.split_k >= 132 or gemv.split_k == tiles


def test_many_rows_are_not_split() -> None:
    config = choose_gemm_config(Problem(4096, 4096, 4096, 4, 32, 128, 2, (9, 0), 132))
    assert (config.block_m, config.block_n, config.split_k) == (128, 128, 1)


def test_steps_of_8_bit_weights_lie_in_one_group() -> None:
    for group_size, block_k in ((32, 32), (64, 64), (96, 32), (128, 64), (0, 64)):
        config = choose_gemm_config(Problem(16, 4096, 4096, 8, 0, group_size, 2, (8, 0), 108))
        assert config.block_k == block_k


@pytest.mark.parametrize("fields", [{"block_m": 24}, {"block_n": 8}, {"split_k": 0}])
def test_impossible_configs_are_named(fields: dict[str, int]) -> None:
    (name, value) = next(iter(fields.items()))
    with pytest.raises(ValueError, match=f"{name} is .*, got {value}"):
        GemmConfig(**fields)


def test_tuned_tables_are_written_and_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def path(gpu: str, folder: Path = tmp_path) -> Path:
        return configs.tuned_path(gpu, folder)

    monkeypatch.setattr(tune, "tuned_path", path)
    problem = {"kernel": "weight_only_gemv", "bits": 4, "n": 64, "k": 512}
    few, many = GemvConfig(split_k=4), GemvConfig(split_k=2)
    for m, config, time in ((1, GemvConfig(), 9.0), (1, few, 3.0), (64, many, 5.0)):
        entry = {**problem, "m": m, "microseconds": time, "config": configs.config_fields(config)}
        tune.write_entries([entry], "Test GPU 80GB")
    table = json.loads((tmp_path / "test-gpu-80gb.json").read_text())
    assert [entry["microseconds"] for entry in table["entries"]] == [3.0, 5.0]

    def found(m: int, n: int = 64, gpu: str = "Test GPU 80GB") -> GemvConfig | None:
        problem = Problem(m, n, 512, 4, 32)
        fields = configs.tuned_config(gpu, "weight_only_gemv", problem, tmp_path)
        return None if fields is None else GemvConfig(**fields)

    assert found(1) == found(7) == few
    assert found(9) == found(4096) == many
    assert found(1, n=65) is None
    assert found(1, gpu="another") is None


def test_tuner_says_that_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["tune", "--n", "64", "--k", "64", "--bits", "4"])
    assert tune.main() == 2
    assert "PyTorch sees none here" in capsys.readouterr().err


def test_tensor_memory_limits_what_is_unrolled() -> None:
    wide, narrow = GemmConfig(block_m=128, block_n=128), GemmConfig(block_m=64, block_n=64)
    assert unrolled_fields(wide, 4, 2, (9, 0)) == 8
    assert unrolled_fields(wide, 4, 2, (10, 0)) == 1
    assert unrolled_fields(narrow, 2, 2, (10, 0)) == 4
    assert unrolled_fields(narrow, 3, 2, (10, 3)) == 2  # a divisor of 10
    assert unrolled_fields(GemmConfig(block_m=16, block_n=64), 2, 2, (10, 0)) == 4
    assert unrolled_fields(narrow, 4, 4, (9, 0)) == 1
    int8 = choose_gemm_config(Problem(1024, 4096, 4096, 4, 32, 64, 1, (10, 0), 132))
    assert (int8.block_m, int8.block_n) == (64, 128)
    assert unrolled_fields(int8, 4, 1, (10, 0)) == 2


def test_a_gemv_has_fewer_outputs_and_columns_of_a_step_than_lanes() -> None:
    for bits, plane, group_size in itertools.product(
        (1, 2, 3, 4, 8), (16, 32, 64), (0, 24, 64, 128)
    ):
        config = choose_gemv_config(Problem(1, 4096, 4096, bits, plane, group_size, 2, (9, 0), 132))
        assert config.block_n < config.num_warps * 32
        assert config.block_k < config.num_warps * 32


def test_scales_are_loaded_once_for_the_fields_of_a_group() -> None:
    assert fields_of_a_group(8, 32, 128) == 4
    assert fields_of_a_group(10, 32, 128) == 2
    assert fields_of_a_group(8, 32, 96) == 1  # its third plane begins another group
    assert fields_of_a_group(8, 32, 0) == 8
    assert fields_of_a_group(8, 32, 24) == 1


def test_a_quarter_of_the_1_bit_fields_is_unrolled() -> None:
    assert unrolled_fields(GemmConfig(), 1, 2, (9, 0)) == 8
    assert unrolled_fields(GemmConfig(block_m=128, block_n=64), 1, 2, (10, 0)) == 2
    # A stage holds x of what a step unrolls, 16 KiB with the words: three fit half of 99 KiB.
    assert choose_gemm_config(Problem(16, 4096, 4096, 1, 32, 64, 2, (8, 6), 84)).num_stages == 3
