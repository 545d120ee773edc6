package edgeq.model

import android.content.Context

/** The names of the model's classes, in the order of their numbers. */
fun GraphModel.Companion.labels(context: Context): List<String> =
    context.assets.open("@FILE@").bufferedReader().use { it.readLines() }
