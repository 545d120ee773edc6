package edgeq.model

import androidx.test.platform.app.InstrumentationRegistry
import kotlinx.coroutines.flow.fold
import kotlinx.coroutines.runBlocking
import org.json.JSONObject
import org.junit.Assert.assertTrue
import org.junit.Assume.assumeTrue
import org.junit.Test

/**
 * The model answers on this device as it did when it was packaged.
 *
 * LiteRT-LM takes and gives text, so the first words of greedy answers are compared. Rounding differs
 * a little between processors and may turn a near tie: one answer in five may begin differently.
 */
class GoldenTest {
    private val instrumentation = InstrumentationRegistry.getInstrumentation()

    private fun golden(name: String): JSONObject =
        JSONObject(instrumentation.context.assets.open(name).bufferedReader().readText())

    @Test
    fun firstWordsAreTheGoldenOnes() = runBlocking {
        val prompts = golden("prompts.json").getJSONArray("prompts")
        var asked = 0
        var opened = 0
        for (tier in LanguageModel.TIERS.distinctBy { it.variant }) {
            val results = golden("${tier.variant}.json").getJSONArray("results")
            val model = try {
                LanguageModel.open(instrumentation.targetContext, listOf(tier), greedy = true)
            } catch (_: ModelUnavailableException) {
                continue // there is no memory for it on this device
            }
            opened += 1
            asked = 0
            val different = mutableListOf<String>()
            model.use {
                for (i in 0 until prompts.length()) {
                    val prompt = prompts.getJSONObject(i)
                    val messages = prompt.optJSONArray("messages") ?: continue
                    // LiteRT-LM renders the template itself, with the date of today
                    if (prompt.getBoolean("dated") || prompt.getBoolean("cut")) continue
                    if (messages.length() != 1) continue
                    asked += 1
                    model.forget()
                    val said = model.answer(messages.getJSONObject(0).getString("content"))
                        .fold("") { text, piece -> text + piece }
                    // four tokens may end within a character, which is then written as U+FFFD
                    val expected = results.getJSONObject(i).getString("text").trimEnd('\uFFFD')
                    if (!said.startsWith(expected)) {
                        different += "${tier.name}: expected '$expected', got '${said.take(40)}'"
                    }
                }
            }
            assertTrue(different.joinToString("\n"), different.size * 5 <= asked)
        }
        assertTrue("there is no memory for any tier", opened > 0)
        assumeTrue("the model has no chat template, or its template writes the date", asked > 0)
    }
}
