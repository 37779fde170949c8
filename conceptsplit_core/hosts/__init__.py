"""The only modules that know a diffusion host: its module tree, its key names, its way of calling the UNet."""
