"""The networks: ResNet backbones and DeepLab heads, in flax.linen."""
