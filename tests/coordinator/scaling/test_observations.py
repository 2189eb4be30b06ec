"""Tables in and out, and what they refuse."""

import numpy as np
import pytest

from coordinator.scaling.columns import Selection
from coordinator.scaling.observations import (
    Convention,
    Observation,
    Observations,
    observations_from_csv,
    observations_from_json,
    observations_to_csv,
    observations_to_json,
    points_from_csv,
)
from protos.contract.errors import UsageError

ROW = Observation(
    params_n=1e8, tokens_d=2e9, compute_flop=1.3e18, loss_nats=3.1, convention=Convention.MATMUL,
    head_params=2e7, seed=3, run_digest="ab12", source="trial, 7",
)  # fmt: skip


def test_tables_survive_both_forms() -> None:
    table = Observations.of(
        [ROW, ROW.converted(Convention.NON_EMBEDDING).converted(ROW.convention)]
    )
    assert observations_from_csv(observations_to_csv(table)).rows == table.rows
    assert observations_from_json(observations_to_json(table)).rows == table.rows


def test_conventions_convert() -> None:
    kaplan = ROW.converted(Convention.NON_EMBEDDING)
    assert kaplan.params_n == 8e7
    assert kaplan.compute_flop == pytest.approx(1.3e18 - 6 * 2e7 * 2e9)
    assert kaplan.converted(Convention.MATMUL).params_n == ROW.params_n


def test_missing_columns_are_filled_and_said() -> None:
    table = observations_from_csv("# a note\nN,D,loss\n1e8,2e9,3\n\n2e8,1e9,2.9\n")
    assert table.compute_flop == pytest.approx([1.2e18, 1.2e18])
    assert "6 N D" in table.notes[0]
    table = observations_from_csv("n,c,LOSS,other\n1e8,1.2e18,3,x\n")
    assert table.tokens_d == pytest.approx([2e9])
    assert table.notes[0] == "columns not used: other" and "C / (6 N)" in table.notes[1]


@pytest.mark.parametrize(("mark", "word"), [(";", "semicolons"), ("\t", "tabs")])
def test_other_separators_are_named(mark: str, word: str) -> None:
    with pytest.raises(UsageError, match=word) as caught:
        observations_from_csv("N,D,loss\n1e8,2e9,3\n".replace(",", mark))
    assert "commas" in caught.value.remedy and "--column" not in caught.value.remedy


def test_points_without_losses() -> None:
    table, losses = points_from_csv("N,D\n1e8,2e9\n", name="g.csv")
    row = table.rows[0]
    assert (row.params_n, row.tokens_d) == (1e8, 2e9) and losses is None
    assert row.compute_flop == pytest.approx(1.2e18)
    *_, losses = points_from_csv("N,D,loss\n1e8,2e9,3\n", name="g.csv")
    assert losses is not None and np.array_equal(losses, [3.0])


MIXED = "tag,d,N,tokens,loss\n" + "".join(
    f"{tag},64,{n}e5,{d}e6,{4 - n / 10 - d / 20}\n"
    for tag in ("const", "wsd") for n in (1, 2, 3) for d in (1, 2)
)  # fmt: skip


def test_columns_are_named_and_rows_chosen() -> None:
    table = observations_from_csv(MIXED)
    assert table.tokens_d[0] == 1e6, "d beside tokens is a width"
    assert "columns not used: tag, d" in table.notes
    assert "several kinds by tag (const, wsd)" in table.warnings[0]
    chosen = observations_from_csv(MIXED, selection=Selection.of(where=["tag=wsd"]))
    assert (len(chosen), chosen.warnings) == (6, ())
    assert "6 of 12 rows have tag = wsd" in chosen.notes[0]
    named = "Model Size,n,D,loss\n1e8,48,2e9,3\n"
    table = observations_from_csv(named, selection=Selection.of(["N=Model Size"]))
    assert table.params_n == pytest.approx([1e8])
    plain = '[{"params": 1e8, "D": 2e9, "loss": 3}]'
    table = observations_from_json(plain, selection=Selection.of(["N=params"]))
    assert table.params_n == pytest.approx([1e8])
    assert points_from_csv("N,D\n1e8,2e9\n", name="g", selection=Selection.of(["N=params"]))


@pytest.mark.parametrize(
    ("text", "columns", "where", "words"),
    [
        ("N,D,loss,loss\n1e8,2e9,3,9\n", [], [], "'loss' (column 3) and 'loss' (column 4)"),
        ("N,n,D,loss\n1e8,48,2e9,3\n", [], [], "'N' (column 1) and 'n' (column 2)"),
        ("N,D,tokens,loss\n1e8,2e9,2e9,3\n", [], [], "'D' (column 2) and 'tokens'"),
        (MIXED, ["N=params"], [], "0 columns 'params'"),
        (MIXED, ["Q=N"], [], "--column Q=N"),
        (MIXED, ["N"], [], "--column 'N'"),
        (MIXED, [], ["tag=cosine"], "no row of the table has tag = cosine"),
        (MIXED, [], ["kind=wsd"], "0 columns 'kind'"),
    ],
)
def test_unclear_columns_are_refused(
    text: str, columns: list[str], where: list[str], words: str
) -> None:
    with pytest.raises(UsageError) as caught:
        observations_from_csv(text, selection=Selection.of(columns, where))
    assert words in caught.value.found and caught.value.allowed and caught.value.remedy


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "columns none"),
        ("N,D\n1,2\n", "columns N, D"),
        ("N,D,loss\n", "no rows"),
        ("N,D,loss\n1e8,2e9,-3\n", "the loss of observation 1 is -3"),
        ("N,D,loss\n1e8,2e9,3\n1e8,2e9,nan\n", "the loss of observation 2 is nan"),
        ("N,D,loss\n1e8,2e9,inf\n", "inf"),
        ("N,D,loss\n0,2e9,3\n", "N of observation 1 is 0"),
        ("N,D,loss\n1e8,,3\n", "D or C"),
        ("N,D,loss\n1e8,much,3\n", "'much'"),
        ("N,D,loss\n1e8,2e9\n", "loss_nats"),
        ("N,D,loss\n1e8,2e9,2e4\n", "20000"),
        ("N,D,loss,convention\n1e8,2e9,3,matmul\n1e8,2e9,3,non-embedding\n", "mixes"),
        ("N,d,C,loss\n1e5,64,6e10,3\n1e5,64,9e10,2.9\n", "times 6 N D"),
        ("N,D,loss,convention\n1e8,2e9,3,matmul\n1e8,2e9,3,\n", "mixes"),
        ("N,D,loss,convention\n1e8,2e9,3,mine\n", "'mine'"),
    ],
)
def test_bad_tables_are_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        observations_from_csv(text, name="the table")
    assert words in caught.value.found
    assert caught.value.remedy


@pytest.mark.parametrize("text", ["{", "3", '{"observations": 4}', "[1]"])
def test_bad_json_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        observations_from_json(text)


def test_an_unknown_head_cannot_be_converted() -> None:
    row = Observation(params_n=1e8, tokens_d=2e9, compute_flop=1e18, loss_nats=3.0)
    for convention in (Convention.MATMUL, Convention.NON_EMBEDDING):
        with pytest.raises(UsageError, match="head_params"):
            row.converted(convention)
