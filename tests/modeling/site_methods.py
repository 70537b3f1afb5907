"""Methods on the inputs of projections, and ones that ask for norms, calibration or the prompt, as a user would write them."""

from dataclasses import dataclass
from typing import ClassVar

from suite.methods.base import Method, SiteName
from suite.methods.m_countdown_cw import MCountdownCw


@dataclass(frozen=True, kw_only=True)
class Teal(Method):
    """The entries of largest magnitude of the inputs of all three projections (arXiv 2408.14690)."""

    name: ClassVar[str] = "teal"
    sites: ClassVar[tuple[SiteName, ...]] = ("mlp.input", "mlp.neurons")
    first_projection: ClassVar = "both"

    def score(self, activations):
        return activations.x.abs()


@dataclass(frozen=True, kw_only=True)
class Allocated(Teal):
    """A share of its own for each site and layer."""

    slope: float = 0.1

    name: ClassVar[str] = "allocated"

    def sparsity_at(self, site):
        share = {"mlp.input": self.sparsity / 2, "mlp.neurons": self.sparsity}[site.name]
        return max(0.0, share - site.layer * self.slope)


@dataclass(frozen=True, kw_only=True)
class TealInput(Teal):
    """The same on gate_proj and up_proj alone."""

    name: ClassVar[str] = "teal-input"
    sites: ClassVar[tuple[SiteName, ...]] = ("mlp.input",)


@dataclass(frozen=True, kw_only=True)
class Wina(Teal):
    """Each entry times the norm of the columns that it is multiplied by (arXiv 2505.19427)."""

    name: ClassVar[str] = "wina"

    def score(self, activations):
        if activations.site.name == "mlp.neurons":
            norm2 = activations.norm2("down", "columns")
        else:
            norm2 = activations.norm2("gate", "columns") + activations.norm2("up", "columns")
        return activations.x.abs() * norm2.sqrt()


@dataclass(frozen=True, kw_only=True)
class Chess(Method):
    """``abs(a)`` times the root mean square of u over calibration tokens."""

    name: ClassVar[str] = "chess"
    first_projection: ClassVar = "gate"
    moments: ClassVar = ("up",)

    def neuron_scale(self, calibrated):
        return calibrated.moments["up"].sqrt()

    def score(self, activations):
        return activations.act.abs() * activations.moments("up").sqrt()


@dataclass(frozen=True, kw_only=True)
class SaysAnother(MCountdownCw):
    """Its factor is not the one of its score."""

    name: ClassVar[str] = "says-another"

    def neuron_scale(self, calibrated):
        return calibrated.moments["act"]


@dataclass(frozen=True, kw_only=True)
class Gated(Method):
    """``abs(u)`` times what a low-rank approximation of the gate says of act(g), its error added."""

    rank: int = 8

    name: ClassVar[str] = "gated"
    first_projection: ClassVar = "up"

    @property
    def factors(self):
        return {"gate": self.rank}

    def score(self, activations):
        gate = activations.factor("gate")
        act = activations.act_fn(gate.apply(activations.input))
        return activations.up.abs() * (act.square() + gate.residual).sqrt()


@dataclass(frozen=True, kw_only=True)
class Griffin(Method):
    """One set a prompt: the neurons that were largest over its tokens (arXiv 2404.01365)."""

    name: ClassVar[str] = "griffin"
    modes: ClassVar = ("ideal",)
    needs_prompt: ClassVar[bool] = True

    def score(self, activations):
        return activations.prompt.sqrt()


@dataclass(frozen=True, kw_only=True)
class Static(Method):
    """One set for all: the product of the norms of a neuron's three vectors."""

    name: ClassVar[str] = "static"

    def score(self, activations):
        norms = [activations.norm2("gate", "rows"), activations.norm2("up", "rows")]
        norm = (norms[0] * norms[1] * activations.norm2("down", "columns")).sqrt()
        return norm.expand(len(activations.up), -1)


@dataclass(frozen=True, kw_only=True)
class Peeking(TealInput):
    """Asks at the input for what is computed after it."""

    name: ClassVar[str] = "peeking"

    def score(self, activations):
        return activations.up


@dataclass(frozen=True, kw_only=True)
class Undeclared(Method):
    """Asks for moments that it does not declare."""

    name: ClassVar[str] = "undeclared"

    def score(self, activations):
        return activations.act.abs() * activations.moments("up")


WRONG = (SaysAnother, Peeking, Undeclared)  # what breaks the contract
