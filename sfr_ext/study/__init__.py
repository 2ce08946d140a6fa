"""Many training runs as one experiment: arms x seeds x settings, and the report on them.

`sfr_ext.study.plan` reads the file, `sfr_ext.study.local` and `sfr_ext.study.cluster` execute the runs.
"""
