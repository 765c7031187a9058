"""What several tests of this room build."""

from functools import partial

import pytest


@pytest.fixture(scope="module")
def build(token_networks):
    """build(...): :func:`small_addp.made` on the session's tokenizer and token predictor."""
    from small_addp import made

    return partial(made, token_networks)
