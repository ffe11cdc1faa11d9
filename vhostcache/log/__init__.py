"""The persistent log: what lies in a cache file, and how it is read again. docs/log-format.md says it byte by byte."""
