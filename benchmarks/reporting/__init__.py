"""What `benchmarks/report.py` is made of, each module using those above it only.

results      what lies in a folder of results, as rows
tables       tables in Markdown
predictions  what the timing model expects of the same calls: predicted.csv
pictures     figures of measured and predicted rows
page         one HTML page of all of it
publishing   README.md and docs/measured.md
"""
