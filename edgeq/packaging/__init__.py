"""Packages: a folder that an app's developer drops into Xcode, Android Studio or a Pi's image.

build, variant, source     from a model to a package, form by form
platforms                  what each platform runs, and why
manifest, tree, blocks     manifest.json, files on disk, blocks of files
prompts, golden_text, golden_graph    golden tests
certificates, estimates, license      what is said of a form and of the model
glue, rpi, ort_mobile, android, ios   the code around the model; templates has its texts
readme, steps              README.md
verify, signing, delta     checks, signatures, what changed from one version to the next
"""
