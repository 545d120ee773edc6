"""Packages: a folder that an app developer adds to an Xcode or Gradle project or a Pi's image.

build, variant, source     convert a model to every form of a package
platforms                  the forms that each platform can run, with the reasons
manifest, tree, blocks     manifest.json, the files on disk, and the blocks that files are cut into
tiers, schema              the settings that the code chooses from, and the schema of the manifest
prompts, golden_text, golden_graph    golden tests
certificates, estimates, license      validation results, expected memory and speed, the license
glue, rpi, ort_mobile, android, ios   the code around the model, written from `templates`
readme, steps              README.md
verify, signing, delta     verification, signatures, and updates from one version to the next
"""
