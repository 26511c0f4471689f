"""evolve-ray: iterative self-refinement training (EVOLVE, arXiv 2502.05605) on Ray, vLLM and DeepSpeed."""

__version__ = "0.1.0"
