"""The table of GGUF types against the setting, llama.cpp's numbers and Ollama's names."""

from __future__ import annotations

from typing import get_args

import pytest
from gguf import LlamaFileType

from tasks.export.gguf_types import GGUF_TYPES, INTERMEDIATE, VOCABULARY, ollama_file_type
from tasks.settings.export import GgufType
from tests.standins.ollama_models import FILE_TYPES


def test_the_setting_names_the_tables_rows() -> None:
    assert set(get_args(GgufType)) == GGUF_TYPES.keys()


@pytest.mark.parametrize("gguf_type", GGUF_TYPES)
def test_numbers_are_llama_cpps_and_names_are_ollamas(gguf_type: GgufType) -> None:
    row = GGUF_TYPES[gguf_type]
    assert LlamaFileType(row.file_type).name == f"MOSTLY_{gguf_type.upper()}"
    assert ollama_file_type(str(row.file_type)) == row.ollama_name
    assert row.ollama_name == FILE_TYPES.get(row.file_type, row.ollama_name), "as far as Ollama was asked"


@pytest.mark.parametrize("number", ["", "0", "9999"])
def test_a_number_that_no_row_has_is_unknown(number: str) -> None:
    assert ollama_file_type(number) == "unknown"


def test_the_converter_writes_what_others_are_quantised_from() -> None:
    assert GGUF_TYPES[INTERMEDIATE].by_converter and GGUF_TYPES[VOCABULARY].by_converter
