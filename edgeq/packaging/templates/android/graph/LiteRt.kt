package edgeq.model

import android.content.Context
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.channels.FileChannel
import org.tensorflow.lite.Interpreter

/**
 * The model "@NAME@" in LiteRT.
 *
 *     GraphModel(context).use { model ->
 *         val outputs = model.run(mapOf(name to values))
 *     }
 *
 * Arrays are given and returned in the order of axes of [INPUTS] and [OUTPUTS], as the model was
 * published; what order the file itself has does not matter here. It is no class for several threads.
 */
class GraphModel(context: Context, threads: Int = 2) : AutoCloseable {
    /** An input or output: its shape, and in which order the file has these axes. */
    class End(val shape: IntArray, internal val order: IntArray) {
        /** How many numbers it has. */
        val size: Int get() = shape.fold(1, Int::times)
    }

    private val interpreter: Interpreter

    init {
        val options = Interpreter.Options()
        options.setNumThreads(threads)
        val model = context.assets.openFd("@FILE@").use { asset ->
            asset.createInputStream().channel
                .map(FileChannel.MapMode.READ_ONLY, asset.startOffset, asset.declaredLength)
        }
        interpreter = Interpreter(model, options)
    }

    /** Runs the model once: arrays by input name to arrays by output name. */
    fun run(inputs: Map<String, FloatArray>): Map<String, FloatArray> {
        require(inputs.keys == INPUTS.keys) { "the inputs are ${INPUTS.keys}, got ${inputs.keys}" }
        val given = HashMap<String, Any>()
        for ((name, end) in INPUTS) given[name] = buffer(toFile(inputs.getValue(name), end))
        val taken = HashMap<String, Any>()
        for ((name, end) in OUTPUTS) taken[name] = buffer(FloatArray(end.size))
        interpreter.runSignature(given, taken, "@SIGNATURE@")
        return OUTPUTS.mapValues { (name, end) ->
            val bytes = taken.getValue(name) as ByteBuffer
            bytes.rewind()
            val values = FloatArray(end.size)
            bytes.asFloatBuffer().get(values)
            fromFile(values, end)
        }
    }

    override fun close() = interpreter.close()

    private fun buffer(values: FloatArray): ByteBuffer {
        val bytes = ByteBuffer.allocateDirect(4 * values.size).order(ByteOrder.nativeOrder())
        bytes.asFloatBuffer().put(values)
        return bytes
    }

    companion object {
        /** Inputs by name. */
        val INPUTS: Map<String, End> = mapOf(
@INPUTS@
        )

        /** Outputs by name. */
        val OUTPUTS: Map<String, End> = mapOf(
@OUTPUTS@
        )

        internal fun toFile(values: FloatArray, end: End): FloatArray {
            require(values.size == end.size) { "an input has ${values.size} numbers, not ${end.size}" }
            val places = places(end)
            return FloatArray(values.size) { values[places[it]] }
        }

        internal fun fromFile(values: FloatArray, end: End): FloatArray {
            val places = places(end)
            val result = FloatArray(values.size)
            for (i in values.indices) result[places[i]] = values[i]
            return result
        }

        /** For each place in the file's order, the place in the published order. */
        private fun places(end: End): IntArray {
            val rank = end.shape.size
            val strides = IntArray(rank) { 1 }
            for (i in rank - 2 downTo 0) strides[i] = strides[i + 1] * end.shape[i + 1]
            val places = IntArray(end.size)
            val at = IntArray(rank)
            for (i in places.indices) {
                var place = 0
                for (axis in 0 until rank) place += at[axis] * strides[end.order[axis]]
                places[i] = place
                var axis = rank - 1
                while (axis >= 0 && ++at[axis] == end.shape[end.order[axis]]) at[axis--] = 0
            }
            return places
        }
    }
}
