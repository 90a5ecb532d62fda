"""SafeCodebook: exact in and out of models and files, and strict about both."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from isic_ray.codebook.artifact import (
    MAX_HEADER_BYTES,
    ArtifactMeta,
    SafeCodebook,
    find_table,
    table_digest,
)
from isic_ray.errors import UserError

torch.set_num_threads(1)
META = ArtifactMeta(
    "transport", "janus", 2, {"strength": 1.0, "concepts": ["weapon"], "unsafe": {"rate": None}}
)


def two_tables(seed: int = 0, changed: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(32, 6, generator=generator)
    edited = base.clone()
    edited[torch.randperm(32, generator=generator)[:changed]] = torch.randn(
        changed, 6, generator=generator
    )
    return base, edited


class StockModel(nn.Module):
    """The path to the table in Hugging Face's Janus and Emu3."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        embedding = nn.Embedding(*table.shape)
        embedding.weight.data = table.clone()
        self.model = nn.Module()
        self.model.vqmodel = nn.Module()
        self.model.vqmodel.quantize = nn.Module()
        self.model.vqmodel.quantize.embedding = embedding


@dataclass
class Adapter:
    codebook: Tensor


def bits(table: Tensor) -> bytes:
    return bytes(table.detach().contiguous().view(torch.uint8).numpy())


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**31 - 1),
    st.integers(0, 32),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_apply_and_revert_are_exact_in_every_precision(
    seed: int, changed: int, stored: torch.dtype, loaded: torch.dtype
) -> None:
    """A checkpoint stored in one type is edited as float32 and loaded in another type."""
    base, edited = two_tables(seed, changed)
    base = base.to(stored).float()
    edited = torch.where(
        (edited != two_tables(seed, changed)[0]).any(1, keepdim=True), edited, base
    )
    data = SafeCodebook.from_tables(base, edited, META).to_bytes()

    model = StockModel(base.to(loaded))
    weight, before = find_table(model), bits(base.to(loaded))
    assert SafeCodebook.from_bytes(data).apply(model) is model
    assert find_table(model) is weight  # in place
    assert bits(weight) == bits(edited.to(loaded))
    SafeCodebook.from_bytes(data).verify(model)
    SafeCodebook.from_bytes(data).apply(model)  # a second time does nothing
    assert bits(weight) == bits(edited.to(loaded))
    SafeCodebook.from_bytes(data).revert(model)  # knows the file alone
    assert bits(weight) == before
    SafeCodebook.from_bytes(data).revert(model)
    assert bits(weight) == before


def test_a_half_precision_model_turned_to_float32_is_the_same_base() -> None:
    base, edited = two_tables()
    artifact = SafeCodebook.from_tables(base, edited, META)
    model = StockModel(base.bfloat16().float())
    artifact.apply(model)
    assert bits(find_table(model)) == bits(edited.bfloat16().float())
    artifact.verify(model)
    artifact.revert(model)
    assert bits(find_table(model)) == bits(base.bfloat16().float())


def test_signed_zeros_are_changes_too() -> None:
    base, _ = two_tables()
    base[3, 2] = 0.0
    edited = base.clone()
    edited[3, 2] = -0.0
    artifact = SafeCodebook.from_tables(base, edited, META)
    assert artifact.rows.tolist() == [3]
    assert bits(artifact.revert_to(artifact.apply_to(base))) == bits(base)


def test_tables_and_adapters() -> None:
    base, edited = two_tables()
    artifact = SafeCodebook.from_tables(base, edited, META)
    kept = base.clone()
    assert torch.equal(artifact.apply_to(base), edited)
    adapter = Adapter(base)
    artifact.apply(adapter)
    artifact.verify(adapter)
    assert torch.equal(adapter.codebook, edited)
    artifact.revert(adapter)
    assert torch.equal(adapter.codebook, kept)
    assert torch.equal(base, kept)  # an adapter's master is never written


def test_another_base_is_refused_and_left_alone() -> None:
    base, edited = two_tables(0)
    other = two_tables(1)[0]
    artifact = SafeCodebook.from_tables(base, edited, META)
    model = StockModel(other)
    for act in (artifact.apply, artifact.revert):
        with pytest.raises(UserError) as refusal:
            act(model)
        assert table_digest(base)[:12] in str(refusal.value)
        assert table_digest(other)[:12] in str(refusal.value)
        assert torch.equal(find_table(model), other)
    with pytest.raises(UserError, match="janus"):
        artifact.apply_to(base[:, :3])
    with pytest.raises(UserError, match=r"float64"):
        artifact.apply_to(base.double())
    with pytest.raises(UserError, match="not the edited table"):
        artifact.verify(StockModel(base))
    tampered = edited.clone()
    tampered[0, 0] += 1e-6
    with pytest.raises(UserError, match="not the edited table"):
        artifact.verify(StockModel(tampered))


@pytest.mark.parametrize("model", [nn.Linear(2, 2), SimpleNamespace(codebook="none"), object()])
def test_models_without_a_table_are_refused(model: object) -> None:
    with pytest.raises(UserError, match="no VQ codebook"):
        SafeCodebook.from_tables(*two_tables(), META).apply(model)


def test_tables_without_data_are_refused() -> None:
    with pytest.raises(UserError, match="meta"):
        SafeCodebook.from_tables(*two_tables(), META).apply(StockModel(two_tables()[0]).to("meta"))


def test_digest_depends_on_shape_and_bits_not_on_layout() -> None:
    base, _ = two_tables()
    assert table_digest(base) == table_digest(base.t().contiguous().t())
    assert table_digest(base) != table_digest(base.reshape(16, 12))
    assert (
        table_digest(base.bfloat16()) == table_digest(base.bfloat16().float()) != table_digest(base)
    )
    one = b"\x00\x00\x80\x3f"  # spelt out, so that files stay readable by later versions
    assert (
        table_digest(torch.ones(2, 3)) == hashlib.sha256(b"float32 [2, 3] " + 6 * one).hexdigest()
    )


def test_file_round_trip(tmp_path: Path) -> None:
    base, edited = two_tables()
    artifact = SafeCodebook.from_tables(base, edited, META)
    artifact.save(tmp_path / "safe.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["safe.safetensors"]
    for where in (tmp_path / "safe.safetensors", f"file://{tmp_path}/safe.safetensors"):
        loaded = SafeCodebook.load(where)
        assert loaded.meta == META
        assert (
            loaded.to_bytes()
            == artifact.to_bytes()
            == SafeCodebook.from_tables(base, edited, META).to_bytes()
        )
        assert (loaded.base_digest, loaded.edited_digest) == (
            table_digest(base),
            table_digest(edited),
        )
        assert torch.equal(loaded.apply_to(base), edited)
    for missing in (tmp_path / "no", tmp_path, f"file://{tmp_path}/no"):
        with pytest.raises(UserError, match="no safe codebook file"):
            SafeCodebook.load(missing)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"shape": [32, 7]}, "shapes"),
        ({"shape": [4, 6]}, "row numbers"),
        ({"shape": 5}, "damaged"),
        ({"schema": 2}, "schema 2"),
        ({"base": {}}, "damaged"),
        ({"notes": 3}, "damaged"),
    ],
)
def test_damaged_records_are_refused(changes: dict[str, object], says: str) -> None:
    artifact = SafeCodebook.from_tables(*two_tables(), META)
    data = artifact.to_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    record = json.loads(header["__metadata__"]["isic_ray"]) | changes
    forged = safetensors.torch.save(safetensors.torch.load(data), {"isic_ray": json.dumps(record)})
    with pytest.raises(UserError, match=says):
        SafeCodebook.from_bytes(forged)


def test_forged_rows_are_refused_before_they_reach_a_model() -> None:
    base, edited = two_tables()
    data = bytearray(SafeCodebook.from_tables(base, edited, META).to_bytes())
    data[-1] ^= 1  # the last of the edited values
    artifact, model = SafeCodebook.from_bytes(bytes(data)), StockModel(base)
    with pytest.raises(UserError, match="as it claims"):
        artifact.apply(model)
    assert torch.equal(find_table(model), base)


def foreign_files() -> dict[str, bytes]:
    pickled = io.BytesIO()
    torch.save({"weight": torch.zeros(2)}, pickled)
    size = (MAX_HEADER_BYTES + 1).to_bytes(8, "little")
    nested = b"[" * 100_000
    return {
        "empty": b"",
        "pickle": pickle.dumps({"a": 1}),
        "torch": pickled.getvalue(),
        "huge header": size + b"{}",
        "nested": len(nested).to_bytes(8, "little") + nested,
        "other safetensors": safetensors.torch.save({"weight": torch.zeros(2)}),
        "truncated": SafeCodebook.from_tables(*two_tables(), META).to_bytes()[:-3],
        "text": b"version https://git-lfs.github.com/spec/v1\n",
    }


@pytest.mark.parametrize("name", list(foreign_files()))
def test_foreign_files_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(foreign_files()[name])
    with pytest.raises(UserError, match=r"file: The "):
        SafeCodebook.load(tmp_path / "file")


def test_what_cannot_be_kept_is_refused_when_made() -> None:
    base, edited = two_tables()
    with pytest.raises(UserError, match="JSON"):
        SafeCodebook.from_tables(
            base, edited, ArtifactMeta("paper", "janus", notes={"x": object()})
        )
    with pytest.raises(UserError, match="JSON"):
        SafeCodebook.from_tables(
            base, edited, ArtifactMeta("paper", "janus", notes={"x": float("nan")})
        )
    with pytest.raises(UserError, match="header"):
        SafeCodebook.from_tables(
            base, edited, ArtifactMeta("paper", "j", notes={"x": "y" * MAX_HEADER_BYTES})
        ).to_bytes()
    with pytest.raises(UserError, match="shape"):
        SafeCodebook.from_tables(base, edited[:4], META)
    edited[0, 0] = float("nan")
    with pytest.raises(UserError, match="finite"):
        SafeCodebook.from_tables(base, edited, META)
