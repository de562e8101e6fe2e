"""What a model says of a data set before any training: measured, put in numbers, in words, drawn.

measured = measure(model, images, batches=16, seed=0)          measure.py
numbers = summarize(measured)
findings = verdict(numbers)                                    report.py
draw(numbers, start, title, file)
"""
