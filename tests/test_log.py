"""One voice: rank 0 tells, other ranks warn, each line once."""

import logging
from collections.abc import Iterator

import pytest

from megatron_lite.log import logger, set_up_logging


@pytest.fixture(autouse=True)
def logger_as_before() -> Iterator[None]:
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    set_up_logging()
    set_up_logging()
    logger.debug("detail")
    logger.info("step %d  loss %.4f", 500, 2.3117)
    logger.warning("the norms of 2 ranks differ")
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err.splitlines()


def test_rank_0_tells_facts_and_warnings_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert said(capsys) == ["step 500  loss 2.3117", "warning: the norms of 2 ranks differ"]


def test_other_ranks_only_warn_and_say_who_they_are(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    assert said(capsys) == ["rank 3: warning: the norms of 2 ranks differ"]


def test_a_handler_on_the_root_logger_does_not_double_the_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    handler = logging.StreamHandler()
    logging.getLogger().addHandler(handler)
    try:
        assert len(said(capsys)) == 2
    finally:
        logging.getLogger().removeHandler(handler)
