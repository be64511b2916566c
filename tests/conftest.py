"""Every test sees eight CPU devices, so that one process can hold any small mesh."""

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
