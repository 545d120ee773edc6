package edgeq.model

import android.app.ActivityManager
import android.content.Context
import android.os.Build
import java.io.File
import java.io.IOException

/** The device cannot run the model now; the message says why, for a log or for the user. */
class ModelUnavailableException(message: String) : Exception(message)

/**
 * A way to run the model: a file with a context length, and the memory that must be free for it.
 *
 * The memory was computed when the package was made, and not measured on a phone.
 *
 * @property name identifier, as in `tiers` of `manifest.json`
 * @property variant identifier of the model file; its golden test has the same name
 * @property entry the model's file or folder among [files]
 * @property context tokens of prompt and answer together
 * @property neededBytes memory that must be free
 * @property files the files of the app that it needs, with their sizes
 */
class Tier internal constructor(
    val name: String,
    val variant: String,
    internal val entry: String,
    val context: Int,
    val neededBytes: Long,
    internal val files: Map<String, Long>,
) {
    companion object {
        /** The first tier for which so much memory is enough; the largest comes first. */
        fun firstWithin(tiers: List<Tier>, freeBytes: Long): Tier? =
            tiers.firstOrNull { it.neededBytes <= freeBytes }
    }
}

/** The model's files on the device, and how much memory there is for it. */
internal object ModelFiles {
    /**
     * The largest of the tiers for which there is memory now, before anything is loaded.
     *
     * Android ends an app that takes too much memory without a word, so ask first.
     */
    fun choose(context: Context, tiers: List<Tier>): Tier {
        if (Build.SUPPORTED_64_BIT_ABIS.isEmpty()) {
            throw ModelUnavailableException("the model needs a 64-bit processor")
        }
        val manager = context.getSystemService(Context.ACTIVITY_SERVICE) as ActivityManager
        val memory = ActivityManager.MemoryInfo()
        manager.getMemoryInfo(memory)
        val free = if (memory.lowMemory) 0 else memory.availMem - memory.threshold
        return Tier.firstWithin(tiers, free)
            ?: throw ModelUnavailableException(
                "the model needs ${tiers.last().neededBytes shr 20} MiB of memory, and " +
                    "${free shr 20} MiB are free",
            )
    }

    /**
     * The model as files that native code can open: copied out of the app's assets once.
     *
     * A copy is complete or not there: it is written beside its place and renamed. [sizes] tells an
     * old version of the model, or one that was cut, from the right one.
     */
    fun install(context: Context, sizes: Map<String, Long>): File {
        val folder = File(context.noBackupFilesDir, "@NAME@")
        for ((name, size) in sizes) {
            val target = File(folder, name)
            if (target.length() == size) continue
            target.parentFile?.mkdirs()
            val partial = File(target.path + ".partial")
            context.assets.open(name).use { input ->
                partial.outputStream().use { output -> input.copyTo(output, 1 shl 20) }
            }
            if (partial.length() != size || !partial.renameTo(target)) {
                partial.delete()
                throw IOException("the model's file $name could not be copied to $target")
            }
        }
        return folder
    }
}
