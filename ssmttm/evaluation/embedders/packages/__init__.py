"""Embedders behind packages that ssmttm does not install, one each."""
