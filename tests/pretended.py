"""The environment of a process that pretends to have several devices."""

import os


def environment(devices: int, **variables: str) -> dict[str, str]:
  """This process's, with `devices` CPU devices, and `variables`.

  XLA's other flags stay, such as those of tests/conftest.py.
  """
  flag = f"--xla_force_host_platform_device_count={devices}"
  flags = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
  return {**os.environ, "XLA_FLAGS": flags, **variables}
