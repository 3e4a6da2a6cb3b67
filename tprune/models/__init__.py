"""The only place that knows timm and transformers."""
