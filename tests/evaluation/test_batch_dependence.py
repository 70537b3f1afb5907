"""Models whose rotary angles follow the width of the batch: a document's score must not depend on its neighbours."""

import pytest
import torch
import transformers

from suite.evaluation.engine import Scorer
from suite.evaluation.plan import Request
from tests.conftest import _SHAPE

ROPES = {
    "longrope": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}


@pytest.mark.parametrize("kind", ROPES)
def test_scores_do_not_depend_on_longer_documents(kind):
    rope = {"rope_theta": 10000.0, "original_max_position_embeddings": 16, **ROPES[kind]}
    shape = _SHAPE | {"max_position_embeddings": 64 if kind == "longrope" else 16}
    config_class = transformers.Phi3Config if kind == "longrope" else transformers.LlamaConfig
    torch.manual_seed(0)
    config = config_class(**shape, original_max_position_embeddings=16, rope_parameters=rope)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(3)
    tokens = [tuple(torch.randint(3, 64, (n,), generator=generator).tolist()) for n in (10, 40)]
    requests = [Request(part[:-1], part[5:], document) for document, part in enumerate(tokens)]
    scorer = Scorer(model, batch_size=8)
    together = [score.loglikelihood for score in scorer.score(requests, None, "all")]
    alone = [scorer.score([request], None, "all")[0].loglikelihood for request in requests]
    assert together == alone
