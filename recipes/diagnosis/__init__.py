"""What a model says of a data set before any training: measured, put in numbers, in words, drawn.

measured = measure(model, images, batches=16, seed=0)          measure.py
numbers = summarize(measured, entropy=0.7)                     levels.py
findings = verdict(numbers)                                    verdict.py
draw(numbers, file)                                            plot.py
"""
