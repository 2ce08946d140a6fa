"""What self-feature regularisation and feature distillation are made of; their public names are in `sfr_ext`."""
