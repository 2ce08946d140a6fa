"""How fast sfr_ext is, and how exact; README.md in this folder says which folder holds what."""
