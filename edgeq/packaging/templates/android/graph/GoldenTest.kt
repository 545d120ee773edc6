package edgeq.model

import androidx.test.platform.app.InstrumentationRegistry
import java.nio.ByteBuffer
import java.nio.ByteOrder
import kotlin.math.sqrt
import org.json.JSONObject
import org.junit.Assert.assertTrue
import org.junit.Test

/** The model computes on this device what it did when it was packaged. */
class GoldenTest {
    private val instrumentation = InstrumentationRegistry.getInstrumentation()

    private fun bytes(name: String): ByteArray =
        instrumentation.context.assets.open(name).use { it.readBytes() }

    private fun golden(name: String): JSONObject = JSONObject(bytes(name).decodeToString())

    private fun floats(about: JSONObject): FloatArray {
        val buffer = ByteBuffer.wrap(bytes(about.getString("file").removePrefix("golden/")))
            .order(ByteOrder.LITTLE_ENDIAN).asFloatBuffer()
        return FloatArray(buffer.remaining()).also { buffer.get(it) }
    }

    @Test
    fun outputsAreTheGoldenOnes() {
        val runs = golden("inputs.json").getJSONArray("runs")
        val allowed = golden("@VARIANT@.json").getJSONObject("allowed")
        val wrong = HashMap<String, Double>()
        val size = HashMap<String, Double>()
        GraphModel(instrumentation.targetContext, threads = 1).use { model ->
            for (i in 0 until runs.length()) {
                val inputs = runs.getJSONObject(i).getJSONObject("inputs")
                val outputs = runs.getJSONObject(i).getJSONObject("outputs")
                val given = inputs.keys().asSequence().associateWith { floats(inputs.getJSONObject(it)) }
                val got = model.run(given)
                for (name in outputs.keys()) {
                    val right = floats(outputs.getJSONObject(name))
                    val values = got.getValue(name)
                    for (at in right.indices) {
                        if (!right[at].isFinite()) continue
                        val difference = (values[at] - right[at]).toDouble()
                        wrong.merge(name, difference * difference, Double::plus)
                        size.merge(name, right[at].toDouble() * right[at], Double::plus)
                    }
                }
            }
        }
        for (name in allowed.keys()) {
            val whole = size.getValue(name)
            val error = sqrt(wrong.getValue(name) / if (whole > 0) whole else 1.0)
            val limit = allowed.getDouble(name)
            assertTrue("$name differs by $error of its size, $limit is allowed", error <= limit)
        }
    }
}
