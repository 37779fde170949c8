"""ConceptSplit: token-wise value adaptation (ToVA) and latent optimisation for disentangled attention (LODA).

This package is the method alone. It needs torch, numpy, einops and safetensors; the modules under
``hosts`` are the only ones that know a diffusion host (ComfyUI, diffusers).

Source: Lim et al., "ConceptSplit: Decoupled Multi-Concept Personalization of Diffusion Models via
Token-wise Adaptation and Attention Disentanglement", ICCV 2025.
"""

from .errors import ConceptSplitError

__version__ = "0.2.0"

__all__ = ["ConceptSplitError", "__version__"]
