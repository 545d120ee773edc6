package edgeq.model

import android.content.Context

/** The names of what the model tells apart, in the order of its numbers. */
fun GraphModel.Companion.labels(context: Context): List<String> =
    context.assets.open("@FILE@").bufferedReader().use { it.readLines() }
